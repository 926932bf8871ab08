"""Text prototypes: what CLIP's text tower makes of the names of the classes. PPAR's original text
prototypes (OTP).

    prototypes.text: {name: text.Text, space: joint, view: none, file: prototypes/cityscapes.pt}
    prototypes.text: {name: text.Text, space: joint, view: none, file: PATH.npy, rows: PATH.txt}

The file is made once, where open_clip is installed; training needs only the file:

    python -m models.prototypes.text out=prototypes/cityscapes.pt classes=cityscapes
    python -m models.prototypes.text out=FILE model=RN50 pretrained=openai templates=single \\
        classes='{Car: [car, van]}'

    model        name in open_clip; ViT-B-16         pretrained  tag of open_clip, or a path; openai
    templates    ensemble (eight of them), single, or a list of texts with {} for the name; ensemble
    classes      cityscapes, camvid, a list, {class: [names to average]}, a .yaml file of these, or
                 a text file of names

With the templates t and the names n of a class c: T_c = norm(mean of norm(encode_text(t(n)))).
Weights of OpenAI get QuickGELU; for other files the model's name decides (ViT-B-16-quickgelu). PPAR
(Zhang et al., IEEE T-ITS 2025) is known from its abstract alone: templates, names and centring are
a reconstruction [R].
"""

import difflib
import io
import os
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from engine.errors import UserError
from engine.files import read_array, read_text, replacing
from engine.process import run
from engine.weights import check_hub, load_into, read, reason, unwrap
from models.prototypes.base import Prototypes

TEMPLATES = {
    "single": ["a photo of a {}."],
    "ensemble": [
        "a photo of a {}.",
        "a photo of the {} in a city street.",
        "a driving scene with a {}.",
        "a {} in the rain.",
        "a {} at night.",
        "a {} in the snow.",
        "a {} in fog.",
        "a rendering of a {}.",
    ],
}
CLASSES = {  # names to average, by the names of the classes in datasets/
    "cityscapes": {
        "road": ["road"],
        "sidewalk": ["sidewalk"],
        "building": ["building"],
        "wall": ["wall"],
        "fence": ["fence"],
        "pole": ["pole"],
        "traffic light": ["traffic light"],
        "traffic sign": ["traffic sign"],
        "vegetation": ["vegetation", "tree", "bush"],
        "terrain": ["terrain", "grass"],
        "sky": ["sky"],
        "person": ["person", "pedestrian"],
        "rider": ["rider", "cyclist"],
        "car": ["car"],
        "truck": ["truck"],
        "bus": ["bus"],
        "train": ["train"],
        "motorcycle": ["motorcycle"],
        "bicycle": ["bicycle"],
    },
    "camvid": {
        "Sky": ["sky"],
        "Building": ["building"],
        "Pole": ["pole"],
        "Road": ["road"],
        "Pavement": ["sidewalk", "pavement"],
        "Tree": ["tree"],
        "SignSymbol": ["traffic sign", "traffic light"],
        "Fence": ["fence"],
        "Car": ["car"],
        "Pedestrian": ["pedestrian"],
        "Bicyclist": ["cyclist", "bicyclist"],
    },
}


def near(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"


def read_names(path):
    """One name per line; of columns between tabs, the first that is not a number."""
    lines = [line.split("\t") for line in read_text(path).splitlines() if line.strip()]
    return [
        next((c.strip() for c in columns if not c.strip().isdigit()), columns[-1])
        for columns in lines
    ]


def write_rows(path, vectors, classes, **about):
    """A file that `read_rows` reads: vectors (K, D) and the names of their classes, complete or not
    at all."""
    content = io.BytesIO()
    torch.save({"vectors": vectors, "classes": [*classes], **about}, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def read_rows(file, rows):
    """A file of text vectors -> vectors (N, D) float64, their names."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}; make it: python -m models.prototypes.text out={path} "
            "classes=..."
        )
    vectors = torch.from_numpy(read_array(path)) if path.suffix == ".npy" else read(path)
    if isinstance(vectors, dict):
        if rows or not {"vectors", "classes"} <= vectors.keys():
            raise ValueError(
                f"{path} must hold `vectors` and `classes`, which name its rows: leave out the "
                "option rows"
            )
        vectors, rows = vectors["vectors"], vectors["classes"]
        if not isinstance(rows, list) or not all(isinstance(name, str) for name in rows):
            raise ValueError(f"{path}: `classes` must be a list of names")
    if (
        not isinstance(vectors, torch.Tensor)
        or vectors.ndim != 2
        or not vectors.is_floating_point()
    ):
        raise ValueError(f"{path} must hold one array of floating-point numbers, a row per name")
    if not rows:
        raise ValueError(
            f"{path} does not name its rows: give rows: a list of names, or a text file of one per "
            "line"
        )
    names = read_names(rows) if isinstance(rows, str) else [str(name) for name in rows]
    if len(names) != len(vectors):
        raise ValueError(
            f"{path} has {len(vectors)} rows and there are {len(names)} names for them"
        )
    return vectors.double(), names


def choose(names, classes, mapped, file):
    """Which rows each class takes -> lists of row numbers; `mapped` is the option map. Case makes
    no difference."""
    names, classes = [name.lower() for name in names], [name.lower() for name in classes]
    mapped = {
        name.lower(): [rows] if isinstance(rows, str) else rows for name, rows in mapped.items()
    }
    for what, words in (("rows", names), ("classes", classes)):
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise ValueError(
                f"{file}: several {what} are called {', '.join(twice)}; each needs a name of its "
                "own"
            )
    for name, rows in mapped.items():
        if name not in classes:
            raise ValueError(
                f"map names the class '{name}', which the data set does not have; "
                f"{near(name, classes)}"
            )
        if wrong := [str(row) for row in rows if str(row).lower() not in names] or not rows:
            wrong = wrong[0] if rows else "nothing"
            raise ValueError(
                f"map.{name} names '{wrong}', which is no row of {file}; "
                f"{near(wrong.lower(), names)}"
            )
    if missing := [name for name in classes if name not in names and name not in mapped]:
        raise ValueError(
            f"{file} has no row for {', '.join(missing)}; its rows are {', '.join(names[:40])}. "
            f"Say which to take: map: {{{missing[0]}: [{names[0]}]}}"
        )
    return [[names.index(str(row).lower()) for row in mapped.get(name, [name])] for name in classes]


def class_rows(file, rows, mapped, classes, num_classes, center):
    """A file of text vectors and the options of Text -> unit rows of the classes (K, D) float64,
    and the same as they are used: centred, if so asked.

    Raises:
        ValueError: a class without a row, or rows that are zero, not finite, or the same.
    """
    vectors, names = read_rows(file, rows)
    if len(classes) != num_classes:
        raise ValueError(f"there are {num_classes} classes and {len(classes)} names of classes")
    vectors, taken = F.normalize(vectors, dim=1), choose(names, classes, mapped, file)
    text = F.normalize(torch.stack([vectors[chosen].mean(0) for chosen in taken]), dim=1)
    centred = text - text.mean(0)
    if not (text.norm(dim=1) > 0.5).all() or (center and centred.norm(dim=1).min() < 1e-4):
        raise ValueError(
            f"{file} has rows that are zero, not finite, or the same, which center does not "
            "work with"
        )
    return text, F.normalize(centred, dim=1) if center else text


class Text(Prototypes):
    """A frozen member of the prototype family.

    Args:
        file: of the command above, or a plain array (N, D) as .npy or .pt.
        rows: names of the rows of a plain array: a list, or a text file with one name per line; of
            columns between tabs the first that is not a number.
        map: {class: [names of rows]} for classes that have no row of their own name: the mean of
            these rows.
        center: subtract the mean of all classes and normalise again. CLIP's rows are close to each
            other (cosines of 0.7 to 0.9), and what they share says nothing about a class.

    Rows may be in any order, and more than needed. State: vectors (K, D), unit rows as used; text
    (K, D), unit rows before centring; seen (K).
    """

    def __init__(
        self,
        *,
        num_classes,
        in_channels,
        classes,
        file: str,
        rows: str | list[str] | None = None,
        map: dict[str, list[str] | str] | None = None,
        center: bool = True,
    ):
        super().__init__()
        text, vectors = class_rows(file, rows, map or {}, classes, num_classes, center)
        if text.shape[1] != in_channels:
            raise ValueError(
                f"{file} has rows of {text.shape[1]} channels and the features have "
                f"{in_channels}: set "
                "model.heads.projector={name: projector.Projector, channels: "
                f"{text.shape[1]}}} and space: joint, or take text of another model"
            )
        self.keep(
            vectors=vectors.float(),
            text=text.float(),
            seen=torch.ones(num_classes, dtype=torch.bool),
        )


def text_vectors(model, tokenizer, prompts):
    """{class: [texts]} -> (K, D) unit rows in float32: of each class, the normalised mean of
    normalised embeddings."""
    rows = []
    with torch.no_grad():
        for texts in prompts.values():
            rows.append(F.normalize(model.encode_text(tokenizer(texts)).double(), dim=1).mean(0))
    return F.normalize(torch.stack(rows), dim=1).float()


def load_clip(model, pretrained):
    """open_clip's CLIP in eval mode, its tokenizer, and which activation it has."""
    from models.backbones.clip import OPENAI, library

    open_clip = library()
    config = open_clip.get_model_config(model)
    if config is None:
        raise UserError(f"open_clip has no model '{model}'; {near(model, open_clip.list_models())}")
    if tag := open_clip.pretrained.get_pretrained_cfg(model, pretrained):
        quick = tag.get("quick_gelu", False)
        check_hub()
        try:
            network = open_clip.create_model(model, pretrained=pretrained, force_quick_gelu=quick)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"could not download or read {pretrained} of {model} ({reason(error)}); give a "
                "copy by pretrained=PATH"
            ) from None
    elif Path(pretrained).is_file():
        state = unwrap(read(pretrained), pretrained)
        quick = config.get("quick_gelu", False) or bool(OPENAI & state.keys())
        network = open_clip.create_model(model, force_quick_gelu=quick, pretrained_text=False)
        load_into(network, {k: v for k, v in state.items() if k not in OPENAI}, source=pretrained)
    else:
        tags = ", ".join(open_clip.pretrained.list_pretrained_tags_by_model(model))
        raise UserError(
            f"there is no file {pretrained}, and the weights that open_clip has of {model} are: "
            f"{tags}"
        )
    return network.eval(), open_clip.get_tokenizer(model), "QuickGELU" if quick else "GELU"


def read_yaml(text, source):
    """A YAML text in which all that is not a list or a mapping is text."""
    try:
        return yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def is_list_of_texts(value):
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def read_classes(given):
    """The argument `classes` -> {class: [names]}."""
    value = CLASSES.get(str(given), given)
    if isinstance(value, str):
        if not os.path.isfile(value):
            raise UserError(
                f"classes={value} is neither {' nor '.join(CLASSES)} nor a file nor a list"
            )
        yaml_file = Path(value).suffix in (".yaml", ".yml")
        value = read_yaml(read_text(value), value) if yaml_file else read_names(value)
    value = {name: [name] for name in value} if is_list_of_texts(value) else value
    pairs = value.items() if isinstance(value, dict) else ()
    classes = {name: [names] if isinstance(names, str) else names for name, names in pairs}
    if not classes or not all(map(is_list_of_texts, classes.values())):
        raise UserError(f"classes={given} must be a list of names, or {{class: [names]}}")
    return classes


def main(arguments):
    options = {
        "out": "",
        "model": "ViT-B-16",
        "pretrained": "openai",
        "classes": "",
        "templates": "ensemble",
    }
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in options or not equals:
            raise UserError(
                f"'{argument}' is not of the form key=value; {near(key, list(options))}"
            )
        options[key] = read_yaml(value, argument)
    for key in ("out", "model", "pretrained"):
        if not isinstance(options[key], str):
            raise UserError(f"{key} must be text, not {options[key]}")
    if not options["out"] or not options["classes"]:
        raise UserError("out=PATH and classes=... are needed")
    templates = TEMPLATES.get(str(options["templates"]), options["templates"])
    if not is_list_of_texts(templates) or any("{}" not in template for template in templates):
        raise UserError(
            f"templates must be {' or '.join(TEMPLATES)}, or a list of texts that hold {{}}"
        )
    classes = read_classes(options["classes"])
    prompts = {
        c: [t.replace("{}", name) for name in names for t in templates]
        for c, names in classes.items()
    }
    model, tokenizer, activation = load_clip(options["model"], options["pretrained"])
    vectors, out = text_vectors(model, tokenizer, prompts), Path(options["out"])
    write_rows(
        out,
        vectors,
        classes,
        prompts=prompts,
        model=options["model"],
        pretrained=options["pretrained"],
        activation=activation,
    )
    print(
        f"{out}: {len(classes)} rows of {vectors.shape[1]} channels, {options['model']} with "
        f"{activation}"
    )


if __name__ == "__main__":
    run(main, __doc__)
