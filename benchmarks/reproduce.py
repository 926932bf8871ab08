"""A grid of experiments: YAMLs x overrides x seeds, several at a time, resumed where it stopped, and one table of
results.

    python -m benchmarks.reproduce benchmarks/grids/camvid_short.yaml runs=2 threads=1
    python -m benchmarks.reproduce benchmarks/grids/camvid_short.yaml table          only the table, from what is finished

The grid file:

    name: camvid_cbp                       # results/camvid_cbp.md and .json
    script: train_supervised.py
    seeds: [0, 1, 2]
    metric: mIoU                           # of the summary in results.json
    scalars: [train/loss]                  # further columns: first and last value in scalars.jsonl, mean over seeds
    common: [data.root=data/camvid, train.iters=800]
    rows:
      linear: {config: configs/camvid/resnet18_linear.yaml}
      CBP + OCCL: {config: configs/camvid/resnet18_cbp_occl.yaml, set: [model.classifier.length=2], seeds: [0]}
      adapted: {config: ..., set: ['stages=[{name: adapt, init: runs/camvid_cbp/linear/seed{seed}/step_0000800.pt}]'],
                after: linear}

`{seed}` stands for the seed of a run; a row with `after` waits until that row has finished with the same seed.

Instead of rows, `pairs` makes one for every ordered pair of data sets and every method, after one model per first set:

    pairs:
      sets: {a: {train: {name: ...}, test: {name: ...}}, b: ...}
      first: {config: ..., set: [...]}                        # trained on `first`: data.train and data.test are set
      methods: {vanilla fine-tuning: {config: ..., set: ['stages=[{..., init: runs/NAME/{first}/seed{seed}/...pt}]']}}

A method is trained on the second set, with the first one as `data.target`; its table has a row per pair, a column per
method and the mean over pairs.

Each run lives in `runs/<name>/<row>/seed<n>`. A run whose results.json exists is skipped; one that was interrupted goes
on from its last checkpoint. Where `python eval.py runs/<name>/*/seed*/step_*.pt diagnostics=true` has looked at the
class vectors of the runs, the table shows what it found. Grid keys (`seeds=[0]`, `common=[...]`) and `runs` (at a
time), `threads` (of each run), `folder`, `out` can be set on the command line, and `common+=[...]` adds to a list. A
failed run is reported with the end of its output, and the others go on.

The grids need their data: most read `data/camvid`, a folder or a link; `common+=[data.root=PATH]` names another one.

The results keep what was measured before: a row and seed without a finished run here stays in the JSON as it is, with
its commit and command, and in the table. Nothing is written as long as no run is finished here.
"""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from engine.config import ConfigError, read_yaml
from engine.files import read_json, read_json_lines, read_text, write
from engine.process import run

KEYS = (
    "name",
    "script",
    "seeds",
    "metric",
    "scalars",
    "common",
    "rows",
    "pairs",
    "runs",
    "threads",
    "folder",
    "out",
)


def load_grid(path, overrides):
    """Grid file and `key=value` overrides -> dict with every key of KEYS."""
    defaults = {
        "script": "train_supervised.py",
        "seeds": [0],
        "metric": "mIoU",
        "common": [],
        "runs": 1,
        "threads": 0,
    }
    defaults |= {
        "scalars": [],
        "folder": "runs",
        "out": "benchmarks/results",
        "pairs": None,
        "rows": {},
    }
    if not Path(path).is_file():
        raise ConfigError(f"there is no grid file {path}")
    grid = defaults | read_yaml(read_text(path), path)
    for text in overrides:
        key, _, value = text.partition("=")
        value, more = read_yaml(value, text), key.endswith("+")
        if more and not (isinstance(grid.get(key[:-1]), list) and isinstance(value, list)):
            raise ConfigError(f"'{text}' adds to a list, and one of the two is none")
        grid |= {key[:-1]: grid[key[:-1]] + value} if more else {key: value}
    for key in [k for k in grid if k not in KEYS] + [k for k in KEYS if k not in grid]:
        raise ConfigError(
            f"{path}: {'unknown' if key in grid else 'missing'} key '{key}'; a grid has {', '.join(KEYS)}"
        )
    return grid | {"rows": grid["rows"] | paired(**grid["pairs"])} if grid["pairs"] else grid


def paired(sets, first, methods):
    """The rows of `pairs`."""

    def row(spec, settings, **more):
        texts = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return {**spec, "set": [*spec.get("set", []), *texts], **more}

    rows = {
        a: row(first, {"data.train": sets[a]["train"], "data.test": {a: sets[a]["test"]}})
        for a in sets
    }
    for a, b in itertools.permutations(sets, 2):
        data = {
            "data.train": sets[b]["train"],
            "data.target": sets[a]["train"],
            "data.test": {b: sets[b]["test"]},
        }
        for method, spec in methods.items():
            spec = spec | {"set": [text.replace("{first}", a) for text in spec.get("set", [])]}
            rows[f"{a} to {b}, {method}"] = row(spec, data, after=a)
    return rows


def pairs_table(grid, table):
    """One line per pair, one column per method, and the mean over the pairs that every method has."""
    methods, metric = list(grid["pairs"]["methods"]), grid["metric"]
    lines, complete = [f"| pair | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"], []
    for a, b in itertools.permutations(grid["pairs"]["sets"], 2):
        runs_of = [table.get(f"{a} to {b}, {method}", {}).get(b, {}).values() for method in methods]
        values = [
            statistics.mean(s[metric] for s in summaries) if summaries else None
            for summaries in runs_of
        ]
        lines.append(
            f"| {a} to {b} | {' | '.join('not yet run' if v is None else f'{v:.2f}' for v in values)} |"
        )
        complete += [values] if None not in values else []
    means = [f"{statistics.mean(column):.2f}" for column in zip(*complete)] or ["-"] * len(methods)
    return [*lines, f"| mean of {len(complete)} pairs | {' | '.join(means)} |"]


def jobs(grid):
    """All runs of a grid -> [(row, seed, folder, command)], seed by seed: every row has a first number early."""
    result = []
    for row, spec in grid["rows"].items():
        for seed in spec.get("seeds", grid["seeds"]):
            folder = (
                Path(grid["folder"]) / grid["name"] / re.sub(r"[^\w.=-]+", "_", row) / f"seed{seed}"
            )
            settings = [
                text.replace("{seed}", str(seed))
                for text in [*grid["common"], *spec.get("set", [])]
            ]
            settings += [f"seed={seed}", f"folder={folder}", "resume=auto"]
            settings += [f"threads={grid['threads']}"] if grid["threads"] else []
            result.append(
                (
                    row,
                    seed,
                    folder,
                    [sys.executable, spec.get("script", grid["script"]), spec["config"], *settings],
                )
            )
    return sorted(result, key=lambda job: job[1])


def execute(todo, at_a_time, threads, after):
    """Run the commands, `at_a_time` side by side -> {folder: exit code}. `after`: {row: the row that comes first}."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    waiting, running, codes = list(todo), {}, {}
    while waiting or running:
        unfinished = {(row, seed) for row, seed, folder, _ in todo if codes.get(folder) != 0}
        ready = [job for job in waiting if (after.get(job[0]), job[1]) not in unfinished]
        if not ready and not running:
            print(f"{len(waiting)} runs wait for rows that failed", flush=True)
            return codes | {folder: 1 for _, _, folder, _ in waiting}
        while ready and len(running) < at_a_time:
            row, seed, folder, command = job = ready.pop(0)
            waiting.remove(job)
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "output.txt", "a") as output:
                running[folder] = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
            print(
                f"{time.strftime('%H:%M')} started {row}, seed {seed} ({len(waiting)} wait)",
                flush=True,
            )
        for folder, process in list(running.items()):
            if process.poll() is not None:
                codes[folder] = running.pop(folder).returncode
                if codes[folder]:
                    tail = (folder / "output.txt").read_text()[-800:]
                    print(f"{folder} failed with code {codes[folder]}:\n{tail}", flush=True)
        time.sleep(0.5)
    return codes


def ends_of(path, name):
    """First and last value of a scalar in a run's scalars.jsonl."""
    values = [line[name] for line in read_json_lines(path) if name in line]
    if not values:
        raise ConfigError(f"{path} has no scalar '{name}'")
    return values[0], values[-1]


def collect(grid):
    """The facts of every finished run."""
    runs = []
    for row, seed, folder, command in jobs(grid):
        path = folder / "results.json"
        if not path.exists():
            continue
        result = read_json(path)
        ends = {name: ends_of(folder / "scalars.jsonl", name) for name in grid["scalars"]}
        runs.append(
            {"row": row, "seed": seed, **result, "command": " ".join(command[1:]), "scalars": ends}
        )
        path = folder / f"eval_step_{result['step']:07d}" / "diagnostics.json"
        if path.exists():
            runs[-1]["diagnostics"] = read_json(path)
    return runs


def merged(grid, new, old):
    """The facts of every run, seed by seed: new ones, and old ones of other rows and seeds."""
    runs = {(facts["row"], facts["seed"]): facts for facts in [*old, *new]}
    order = [*grid["rows"], *dict.fromkeys(row for row, _ in runs)]
    return sorted(runs.values(), key=lambda facts: (facts["seed"], order.index(facts["row"])))


def summaries_of(runs):
    """The facts of every run -> {row: {test set: {seed: summary}}}."""
    table = {}
    for facts in runs:
        summaries = dict(facts["results"])
        if "unseen_mIoU" in facts:  # of train_dg.py: the mean over the domains that were not seen
            summaries["unseen"] = {"mIoU": facts["unseen_mIoU"]}
        for name, summary in summaries.items():
            table.setdefault(facts["row"], {}).setdefault(name, {})[facts["seed"]] = summary
    return table


def per_class(grid, runs):
    """One table per test set: IoU of each class, mean accuracy of the classes and accuracy of the pixels, mean over
    seeds."""
    lines, sets = [], list(dict.fromkeys(name for facts in runs for name in facts.get("IoU", {})))
    for name in sets:
        found = [
            (
                facts["row"],
                facts["IoU"][name] | {key: facts["results"][name][key] for key in ("mAcc", "aAcc")},
            )
            for facts in runs
            if name in facts.get("IoU", {})
        ]
        classes = list(found[0][1])
        lines += [
            "",
            f"IoU of each class on {name}, mean over seeds:",
            "",
            f"| row | {' | '.join(classes)} |",
        ]
        lines.append(f"|---|{'---|' * len(classes)}")
        for row in grid["rows"]:
            ious = [values for owner, values in found if owner == row]
            if ious:
                known = [[values[c] for values in ious if values[c] is not None] for c in classes]
                cells = [f"{statistics.mean(values):.1f}" if values else "-" for values in known]
                lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def diagnosed(grid, runs):
    """Diagnostics of the class vectors and of the first test set, mean over seeds: a line per row that eval.py has
    looked at."""
    found = [(facts["row"], facts["diagnostics"]) for facts in runs if "diagnostics" in facts]
    if not found:
        return []
    name, first = next(iter(found[0][1]["sets"].items()))
    pairs, last = list(first["pairs"]), len(first["groups"]) - 1
    heads = [
        "seeds",
        "CS",
        "CS of abs. cosines",
        "max abs. cosine",
        "r(norm, pixels)",
        "F1, rarest",
        "F1, commonest",
    ]
    lines = [
        "",
        f"Class vectors, and {name}, mean over seeds (`eval.py ... diagnostics=true`, engine/diagnostics.py):",
    ]
    lines += [
        "",
        f"| row | {' | '.join([*heads, *pairs])} |",
        f"|---|{'---|' * len([*heads, *pairs])}",
    ]
    for row in grid["rows"]:
        values = []
        for d in (d for owner, d in found if owner == row):
            here = d["sets"][name]
            ends = [here["groups"][i]["F1"] for i in (0, last)]
            values.append(
                [
                    d["CS"],
                    d["CS_abs"],
                    d["max_cos"],
                    d["norm_pixels"],
                    *ends,
                    *here["pairs"].values(),
                ]
            )
        columns = [[v for v in column if v is not None] for column in zip(*values)]
        cells = [
            f"{round(statistics.mean(column), 2) + 0.0:.2f}" if column else "-"
            for column in columns
        ]
        lines += [f"| {row} | {len(values)} | {' | '.join(cells)} |"] if values else []
    rarest, commonest = (", ".join(first["groups"][i]["classes"]) for i in (0, last))
    return [
        *lines,
        "",
        f"Rarest in training: {rarest}; commonest: {commonest}. Pairs: sum of the IoU of both.",
    ]


def markdown(grid, runs):
    """One line per row, one column per test set: mean and standard deviation over seeds."""
    runs = [facts for facts in runs if facts["row"] in grid["rows"]]
    if not runs:
        return "no run is finished\n"
    table = summaries_of(runs)
    sets = list(dict.fromkeys(name for columns in table.values() for name in columns))
    metric = grid["metric"]
    heads = [*(f"{name} {metric}" for name in sets), *grid["scalars"]]
    lines = [f"| row | seeds | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for row in grid["rows"]:
        columns = table.get(row, {})
        cells = []
        for name in sets:
            values = [s[metric] for s in columns.get(name, {}).values() if s[metric] is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "not yet run")
        for name in grid["scalars"]:
            ends = [
                facts["scalars"][name]
                for facts in runs
                if facts["row"] == row and name in facts.get("scalars", {})
            ]
            cells.append(
                " to ".join(f"{statistics.mean(values):.3g}" for values in zip(*ends))
                or "not yet run"
            )
        seeds = max((len(by_seed) for by_seed in columns.values()), default=0)
        lines.append(f"| {row} | {seeds} | {' | '.join(cells)} |")

    lines = pairs_table(grid, table) if grid["pairs"] else lines

    def distinct(key):
        return ", ".join(sorted({str(r[key]) for r in runs})) or "-"

    minutes = sorted(r["seconds"] / 60 for r in runs)
    lines += [
        "",
        f"Command: `python -m benchmarks.reproduce {grid['file']}`. Commit {distinct('commit')}; {distinct('device')}; "
        f"torch {distinct('torch')}; {distinct('iters')} steps; seeds {distinct('seed')}; {minutes[0]:.1f} to "
        f"{minutes[-1]:.1f} minutes a run. Last checkpoint. ± is the standard deviation over seeds.",
    ]
    return "\n".join([*lines, *per_class(grid, runs), *diagnosed(grid, runs)]) + "\n"


def main(arguments):
    only_table = "table" in arguments
    settings = [argument for argument in arguments[1:] if argument != "table"]
    told = [
        text for text in settings if not text.startswith(("runs=", "threads=", "folder=", "out="))
    ]
    grid = load_grid(arguments[0], settings) | {"file": " ".join([arguments[0], *told])}
    todo = [job for job in jobs(grid) if not (job[2] / "results.json").exists()]
    after = {row: spec["after"] for row, spec in grid["rows"].items() if "after" in spec}
    codes = {} if only_table else execute(todo, grid["runs"], grid["threads"], after)
    new, path = collect(grid), Path(grid["out"]) / f"{grid['name']}.json"
    old = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = merged(grid, new, old)
    text = markdown(grid, runs)
    print(f"\n{text}")
    if new:
        write(path.with_suffix(".md"), text)
        write(path, json.dumps({"grid": grid, "runs": runs}, indent=1))
        kept = len(runs) - len(new)
        print(f"written to {path} and .md{f', {kept} earlier runs kept' if kept else ''}")
    else:
        print(f"no run of this grid is finished in {grid['folder']}/: nothing was written")
    if any(codes.values()):
        sys.exit(
            f"{sum(map(bool, codes.values()))} of {len(codes)} runs failed; start again to go on with them"
        )


if __name__ == "__main__":
    run(main, __doc__)
