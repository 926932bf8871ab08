"""What a checkpoint must hold: a wrong kind, version or part is refused by its name."""

import pytest
import torch

import predict
from engine import checkpoint, contents
from engine.config import Config, ConfigError
from engine.weights import WeightsError
from tests.engine.damaged import refused
from tests.fuzz.files import a_checkpoint, saved

WRONG = {
    "config": [5, "seed: 1", None, []],
    "classes": ["road", ["road", 3, "sky"], [], ["a", "a", "b"], ["a", "b"]],
    "palette": [[[0, 0]] * 3, [[0, 0, 256]] * 3, [[0, 0, 0.5]] * 3, "red", [[0, 0, 0]], torch.zeros(3, 3)],
    "model": [[1], {"w": 3}, {3: torch.zeros(1)}, torch.zeros(2)],
    "teacher": [None, {"network.w": [1.0]}],
    "step": ["3", 3.5, -1, True, torch.tensor(3)],
    "stage": [-1, "main", None, 1, 10**30],
    "stage_step": [0.5, 1001, True, "3", None],
    "best": ["high", float("nan"), None],
    "seconds": [[1], float("inf")],
    "rng": [{}, [{}], [torch.zeros(4)], [{"torch": torch.zeros(8, dtype=torch.uint8)}], [{"torch": 3}]],
    "optimizer": [{}, {"state": {}, "param_groups": 3}, {"state": [], "param_groups": [{}]}, None],
    "scaler": [3],
    "prototypes": [{"centroids": 3}],
    "labelers": [[1]],
    "data": [[], {"train": 5}, {"train": []}, {"train": [3, 4]}, {3: [3, "a"]}],
    "maps": ["target/x", ["x"], ["target/../../x"], ["target/a/b"], ["other/x"], [3], ["target/.."],
             ["../target/x"], ["1_a/../target/x"], ["a/target/x"], ["1_/target/x"]],
}  # fmt: skip


@pytest.mark.parametrize("key", [*WRONG])
def test_a_checkpoint_whose_key_is_of_another_kind_is_refused_by_its_name(tmp_path, key):
    for value in WRONG[key]:
        text = refused(tmp_path / "a.pt", saved(a_checkpoint() | {key: value}), checkpoint.load)
        assert "is not a checkpoint of this project: '" in text
        assert f"'{key}' must be" in text or (key == "palette" and "'classes'" in text)


@pytest.mark.parametrize("version", ["1", 2, None, True, torch.ones(3)])
def test_a_checkpoint_has_a_version(tmp_path, version):
    data = saved(a_checkpoint() | {"format": version})
    assert "(format 1)" in refused(tmp_path / "a.pt", data, checkpoint.load)


def test_a_checkpoint_without_what_evaluation_or_a_resumed_run_needs_says_what_is_missing(tmp_path):
    content = a_checkpoint()
    del content["classes"], content["config"]
    text = refused(tmp_path / "a.pt", saved(content), checkpoint.load)
    assert "not a checkpoint of this project: it lacks config, classes" in text
    for key in ("stage_step", "maps", "labelers"):
        path = tmp_path / f"without_{key}.pt"
        path.write_bytes(saved({k: v for k, v in a_checkpoint().items() if k != key}))
        with pytest.raises(WeightsError, match=f"cannot be resumed from: it lacks {key};"):
            checkpoint.load(path, contents.RESUMED)
    checkpoint.save_light(tmp_path / "best.pt", a_checkpoint())
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 3

    def resume(path):
        checkpoint.find(Config({"folder": tmp_path / "none", "resume": str(path)}))

    text = refused(tmp_path / "best.pt", read=resume)
    assert "cannot be resumed from: it lacks optimizer, scaler, rng; take a step_<n>.pt" in text


@pytest.mark.parametrize(
    "configuration, message",
    [({"model": 5}, "model must be a mapping"), ({"optimzer": {}}, "unknown key 'optimzer'"),
     ({"eval": {"flip": 3}}, "eval.flip must be true or false"), ({3: 4}, "unknown key '3'")],
)  # fmt: skip
def test_the_configuration_of_a_checkpoint_is_checked_like_that_of_a_file(
    tmp_path, configuration, message
):
    (tmp_path / "a.pt").write_bytes(saved(a_checkpoint() | {"config": configuration}))
    with pytest.raises(ConfigError, match=rf"the configuration in .*a\.pt: {message}"):
        checkpoint.load(tmp_path / "a.pt")


def test_predict_refuses_edited_checkpoints_in_one_line(tmp_path):
    pictures = tmp_path / "in"
    pictures.mkdir()
    (pictures / "a.png").touch()

    def label(path):
        predict.main([str(path), str(pictures), str(tmp_path / "out")])

    for key in ("config", "classes", "palette", "model", "step", "stage"):
        refused(tmp_path / "a.pt", saved(a_checkpoint() | {key: WRONG[key][0]}), label)
