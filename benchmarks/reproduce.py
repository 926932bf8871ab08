"""A grid of experiments: YAMLs x overrides x seeds, several at a time, resumed, and their table.

    python -m benchmarks.reproduce benchmarks/grids/camvid_short.yaml runs=2 threads=1
    python -m benchmarks.reproduce benchmarks/grids/camvid_short.yaml table  # of what is finished

The grid file:

    name: camvid_cbp                       # results/camvid_cbp.md and .json
    script: train_supervised.py
    seeds: [0, 1, 2]
    metric: mIoU                           # of the summary in results.json; "mIoU, mAcc": both
    scalars: [train/loss]                  # columns: first and last value in scalars.jsonl
    common: [data.root=data/camvid, train.iters=800]
    rows:
      linear: {config: configs/camvid/resnet18_linear.yaml}
      CBP + OCCL: {config: configs/camvid/resnet18_cbp_occl.yaml, set: [seed=1], seeds: [0]}
      adapted: {config: ..., set: ['stages=[{name: adapt, init: runs/.../seed{seed}/....pt}]'],
                after: linear}

`{seed}` stands for the seed of a run; a row with `after` waits until that row has finished with
the same seed. Instead of rows, `pairs` makes one for every ordered pair of data sets and every
method, after one model per first set:

    pairs:
      sets: {a: {train: {name: ...}, test: {name: ...}}, b: ...}
      first: {config: ..., set: [...]}     # trained on `first`: sets data.train and data.test
      methods: {fine-tuning: {config: ..., set: ['stages=[{..., init: runs/.../{first}/....pt}]']}}

A method is trained on the second set, with the first one as `data.target`; its table has a row
per pair, a column per method and the mean over pairs.

Each run lives in `runs/<name>/<row>/seed<n>`. A run whose results.json exists is skipped; one that
was interrupted goes on from its last checkpoint. Where `python eval.py
runs/<name>/*/seed*/step_*.pt diagnostics=true` (class vectors) or `domains=true` (distances between
domains) has looked at the runs, the table shows what it found. Grid keys (`seeds=[0]`,
`common=[...]`) and `runs` (at a time), `threads` (of each run), `folder`, `out`, and `only=[row,
...]` (which of them to run) can be set on the command line, and `common+=[...]` adds to a list. A
failed run is reported with the end of its output, and the others go on. A folder whose run had
other settings than the grid has now is an error: its numbers are not those of the grid.

The grids need their data: most read `data/camvid`, a folder or a link;
`common+=[data.root=PATH]` names another one.

The results keep what was measured before: a row and seed without a finished run here stays in the
JSON as it is, with its commit and command, and in the table. Nothing is written as long as no run
is finished here.
"""

import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.grid import DEFAULTS, LOCAL, load_grid
from engine.config import ConfigError
from engine.files import read_json, read_json_lines, write
from engine.process import run

LOOKS = ("diagnostics", "domains")  # modes of eval.py whose findings the tables show
PLACES = re.compile(r"(folder|resume|threads|device|data\.root|data\.workers)=")  # of one run


def pairs_table(grid, table):
    """One line per pair, one column per method, and the mean over pairs that are complete."""
    methods, metric = list(grid["pairs"]["methods"]), grid["metric"]
    lines, complete = [f"| pair | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"], []
    for a, b in itertools.permutations(grid["pairs"]["sets"], 2):
        runs_of = [table.get(f"{a} to {b}, {method}", {}).get(b, {}).values() for method in methods]
        values = [statistics.mean(s[metric] for s in found) if found else None for found in runs_of]
        cells = ["not yet run" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {a} to {b} | {' | '.join(cells)} |")
        complete += [values] if None not in values else []
    means = [f"{statistics.mean(column):.2f}" for column in zip(*complete)] or ["-"] * len(methods)
    return [*lines, f"| mean of {len(complete)} pairs | {' | '.join(means)} |"]


def jobs(grid):
    """All runs of a grid -> [(row, seed, folder, command)], seed by seed: no row waits for long."""
    result = []
    for row, spec in grid["rows"].items():
        for seed in spec.get("seeds", grid["seeds"]):
            name = re.sub(r"[^\w.=-]+", "_", row)
            folder = Path(grid["folder"]) / grid["name"] / name / f"seed{seed}"
            texts = [*grid["common"], *spec.get("set", [])]
            settings = [text.replace("{seed}", str(seed)) for text in texts]
            settings += [f"seed={seed}", f"folder={folder}", "resume=auto"]
            settings += [f"threads={grid['threads']}"] if grid["threads"] else []
            script = spec.get("script", grid["script"])
            result.append((row, seed, folder, [sys.executable, script, spec["config"], *settings]))
    return sorted(result, key=lambda job: job[1])


def execute(todo, at_a_time, threads, after):
    """Run the commands, `at_a_time` side by side -> {folder: exit code}.

    Args:
        after: {row: the row that comes first}.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    waiting, running, codes = list(todo), {}, {}
    while waiting or running:
        unfinished = {(row, seed) for row, seed, folder, _ in todo if codes.get(folder) != 0}
        ready = [job for job in waiting if (after.get(job[0]), job[1]) not in unfinished]
        if not ready and not running:
            for row, seed, *_ in waiting:
                reason = f"waits for '{after[row]}', which failed or waits itself"
                print(f"not run: {row}, seed {seed}, {reason}", flush=True)
            return codes | {folder: 1 for _, _, folder, _ in waiting}
        while ready and len(running) < at_a_time:
            row, seed, folder, command = job = ready.pop(0)
            waiting.remove(job)
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "output.txt", "a") as output:
                running[folder] = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
            now = time.strftime("%H:%M")
            print(f"{now} started {row}, seed {seed} ({len(waiting)} wait)", flush=True)
        for folder, process in list(running.items()):
            if process.poll() is not None:
                codes[folder] = running.pop(folder).returncode
                if codes[folder]:
                    tail = (folder / "output.txt").read_text()[-800:]
                    print(f"{folder} failed with code {codes[folder]}:\n{tail}", flush=True)
        time.sleep(0.5)
    return codes


def check_settings(todo):
    """Raise ConfigError where the run in a job's folder is not the one that the grid describes."""
    for row, seed, folder, command in todo:
        path = folder / "results.json"
        told = read_json(path).get("command", "") if path.exists() else ""
        its, now = ([t for t in c if not PLACES.match(t)] for c in (shlex.split(told), command[1:]))
        if told and " ".join(its) != " ".join(now):  # older runs wrote it without quotes
            changes = [f"- {text}" for text in its if text not in now]
            changes += [f"+ {text}" for text in now if text not in its]
            raise ConfigError(
                f"{folder} holds a run of '{row}', seed {seed}, with other settings than the grid "
                f"has now: {', '.join(changes) or 'their order'}. Remove the folder to run it "
                "again, or give the grid another name"
            )


def ends_of(path, name):
    """First and last value of a scalar in a run's scalars.jsonl."""
    values = [line[name] for line in read_json_lines(path) if name in line]
    if not values:
        raise ConfigError(f"{path} has no scalar '{name}'")
    return values[0], values[-1]


def collect(grid):
    """The facts of every finished run."""
    runs = []
    anywhere = grid | {key: DEFAULTS[key] for key in LOCAL}
    for (row, seed, folder, _), (*_, command) in zip(jobs(grid), jobs(anywhere)):
        path = folder / "results.json"
        if not path.exists():
            continue
        result = read_json(path)
        ends = {name: ends_of(folder / "scalars.jsonl", name) for name in grid["scalars"]}
        runs.append(
            {"row": row, "seed": seed, **result, "command": " ".join(command[1:]), "scalars": ends}
        )
        looked = folder / f"eval_step_{result['step']:07d}"
        for name in LOOKS:
            if (looked / f"{name}.json").exists():
                runs[-1][name] = read_json(looked / f"{name}.json")
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


def table_of(heads, rows):
    """The lines of a table: its first column is named "row".

    Args:
        rows: [(name, cells)].
    """
    lines = [f"| row | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)]


def means_of(rows, digits):
    """Mean of each column over the rows that know it, as text; "-" where none does."""
    columns = [[value for value in column if value is not None] for column in zip(*rows)]
    means = [round(statistics.mean(c), digits) + 0.0 if c else None for c in columns]  # no -0.0
    return ["-" if mean is None else f"{mean:.{digits}f}" for mean in means]


def per_class(grid, runs):
    """One table per test set: IoU of each class, mAcc and aAcc, mean over seeds."""
    lines = []
    for name in dict.fromkeys(name for facts in runs for name in facts.get("IoU", {})):
        found = []
        for facts in (facts for facts in runs if name in facts.get("IoU", {})):
            accuracies = {key: facts["results"][name][key] for key in ("mAcc", "aAcc")}
            found.append((facts["row"], facts["IoU"][name] | accuracies))
        classes = list(found[0][1])
        rows = []
        for row in grid["rows"]:
            values = [[values[c] for c in classes] for owner, values in found if owner == row]
            rows += [(row, means_of(values, 1))] if values else []
        lines += ["", f"IoU of each class on {name}, mean over seeds:", ""]
        lines += table_of(classes, rows)
    return lines


def diagnosed(grid, runs):
    """Diagnostics of the class vectors and of the first test set, mean over seeds.

    A line per row that eval.py has looked at.
    """
    found = [(facts["row"], facts["diagnostics"]) for facts in runs if "diagnostics" in facts]
    if not found:
        return []
    name, first = next(iter(found[0][1]["sets"].items()))
    heads = ["seeds", "CS", "CS of abs. cosines", "max abs. cosine", "r(norm, pixels)"]
    heads += ["F1, rarest", "F1, commonest", *first["pairs"]]
    rows = []
    for row in grid["rows"]:
        values = []
        for facts in (facts for owner, facts in found if owner == row):
            vectors = [facts[key] for key in ("CS", "CS_abs", "max_cos", "norm_pixels")]
            here = facts["sets"][name]
            ends = [here["groups"][i]["F1"] for i in (0, len(first["groups"]) - 1)]
            values.append([*vectors, *ends, *here["pairs"].values()])
        rows += [(row, [str(len(values)), *means_of(values, 2)])] if values else []
    rarest, commonest = (", ".join(first["groups"][i]["classes"]) for i in (0, -1))
    return [
        "",
        f"Class vectors, and {name}, mean over seeds "
        "(`eval.py ... diagnostics=true`, engine/diagnostics.py):",
        "",
        *table_of(heads, rows),
        "",
        f"Rarest in training: {rarest}; commonest: {commonest}. Pairs: sum of the IoU of both.",
    ]


def gaps(grid, runs):
    """One table per space of what eval.py has measured between the domains, mean over seeds."""
    found = [(facts["row"], facts["domains"]) for facts in runs if "domains" in facts]
    lines, source = [], found[0][1]["source"] if found else None
    for space in dict.fromkeys(space for _, look in found for space in look["spaces"]):
        looks = [(owner, look["spaces"][space]) for owner, look in found if space in look["spaces"]]
        terms = {name: values for _, look in looks for name, values in look.items()}
        heads = [f"{name}: {key}" for name, values in terms.items() for key in values]
        rows = []
        for row in grid["rows"]:
            values = [
                [terms.get(name, {}).get(key) for name, key in (head.split(": ") for head in heads)]
                for owner, terms in looks
                if owner == row
            ]
            rows += [(row, [str(len(values)), *means_of(values, 3)])] if values else []
        title = f"Domains in the space {space}, as seen from {source}, mean over seeds "
        title += "(`eval.py ... domains=true`, engine/domains.py):"
        lines += ["", title, "", *table_of(["seeds", *heads], rows)]
    return lines


def markdown(grid, runs):
    """One line per row, one column per test set: mean and standard deviation over seeds."""
    runs = [facts for facts in runs if facts["row"] in grid["rows"]]
    if not runs:
        return "no run is finished\n"
    table = summaries_of(runs)
    sets = list(dict.fromkeys(name for columns in table.values() for name in columns))
    shown = list(itertools.product(sets, grid["metric"].split(", ")))
    heads = [*(f"{name} {metric}" for name, metric in shown), *grid["scalars"]]
    summaries = [s for columns in table.values() for by in columns.values() for s in by.values()]
    known = sorted({key for summary in summaries for key in summary})
    if wrong := [metric for _, metric in shown if metric not in known]:
        raise ConfigError(f"no summary has the metric '{wrong[0]}'; there are {', '.join(known)}")
    rows = []
    for row in grid["rows"]:
        columns = table.get(row, {})
        empty = "-" if columns else "not yet run"  # of a set that the row is not tested on
        cells = []
        for name, metric in shown:
            values = [s.get(metric) for s in columns.get(name, {}).values()]
            values = [value for value in values if value is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else empty)
        for name in grid["scalars"]:
            scalars = [facts.get("scalars", {}) for facts in runs if facts["row"] == row]
            ends = zip(*(values[name] for values in scalars if name in values))
            means = [f"{statistics.mean(values):.3g}" for values in ends]
            cells.append(" to ".join(means) or empty)
        seeds = max((len(by_seed) for by_seed in columns.values()), default=0)
        rows.append((row, [str(seeds), *cells]))
    lines = pairs_table(grid, table) if grid["pairs"] else table_of(["seeds", *heads], rows)

    def distinct(key):
        return ", ".join(sorted({str(r[key]) for r in runs})) or "-"

    minutes = sorted(r["seconds"] / 60 for r in runs)
    lines += [
        "",
        f"Command: `python -m benchmarks.reproduce {grid['file']}`. Commit {distinct('commit')}; "
        f"{distinct('device')}; torch {distinct('torch')}; {distinct('iters')} steps; "
        f"seeds {distinct('seed')}; {minutes[0]:.1f} to {minutes[-1]:.1f} minutes a run. "
        "Last checkpoint. ± is the standard deviation over seeds.",
    ]
    lines += [*per_class(grid, runs), *diagnosed(grid, runs), *gaps(grid, runs)]
    return "\n".join(lines) + "\n"


def main(arguments):
    only_table = "table" in arguments
    settings = [argument for argument in arguments[1:] if argument != "table"]
    told = [text for text in settings if text.partition("=")[0] not in LOCAL]
    grid = load_grid(arguments[0], settings) | {"file": " ".join([arguments[0], *told])}
    every = jobs(grid)
    check_settings(every)
    todo = [job for job in every if not (job[2] / "results.json").exists()]
    todo = [job for job in todo if not grid["only"] or job[0] in grid["only"]]
    after = {row: spec["after"] for row, spec in grid["rows"].items() if "after" in spec}
    codes = {} if only_table else execute(todo, grid["runs"], grid["threads"], after)
    new, path = collect(grid), Path(grid["out"]) / f"{grid['name']}.json"
    old = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = merged(grid, new, old)
    text = markdown(grid, runs)
    print(f"\n{text}")
    if new:
        write(path.with_suffix(".md"), text)
        measured = {key: value for key, value in grid.items() if key not in LOCAL}
        write(path, json.dumps({"grid": measured, "runs": runs}, indent=1))
        kept = len(runs) - len(new)
        print(f"written to {path} and .md{f', {kept} earlier runs kept' if kept else ''}")
    else:
        print(f"no run of this grid is finished in {grid['folder']}/: nothing was written")
    if failed := sum(map(bool, codes.values())):
        sys.exit(f"{failed} of {len(codes)} runs failed; start again to go on with them")


if __name__ == "__main__":
    run(main, __doc__)
