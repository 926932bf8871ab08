"""Damage configurations and picture files at random, and count how the project answers.

    python -m tests.fuzz --seed 0                       1000 configurations, 500 pictures
    python -m tests.fuzz --seed 0 --only 17             one configuration: what was read, with its traceback

The exit code is 1 after a traceback, after more than five seconds for one of them, or if anything was executed.
"""

import argparse
import importlib.util
import sys

from tests.fuzz import configurations


def show(seed, number):
    """Print one mutation and let its error through."""
    with configurations.confined() as folder:
        script, content, overrides = configurations.mutation(seed, number, str(folder / "executed"))
        (folder / "mutated.yaml").write_bytes(content)
        print(f"{script}.py {overrides}\n{content.decode('utf-8', 'backslashreplace')[:20_000]}")
        configurations.attempt(script, folder / "mutated.yaml", overrides)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configurations", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--only", type=int, help="number of one configuration")
    parser.add_argument("--messages", action="store_true", help="print every message")
    options = parser.parse_args()
    if options.only is not None:
        return show(options.seed, options.only)
    counts, found = configurations.run(options.seed, options.configurations)
    shown = configurations.OUTCOMES[1:] if options.messages else configurations.OUTCOMES[2:]
    for number, outcome, what in found:
        if outcome in shown:
            print(f"{number:4d} {outcome}: {what[:300] if options.messages is False else what}")
    print("configurations: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    if options.pictures:
        if importlib.util.find_spec("tests.fuzz.pictures") is None:
            sys.exit("there is no tests/fuzz/pictures.py; --pictures 0 tries configurations alone")
        from tests.fuzz import pictures

        more = pictures.run(options.seed, options.pictures)
        print("pictures: " + ", ".join(f"{number} {name}" for name, number in more.items()))
        counts = {name: counts.get(name, 0) + more.get(name, 0) for name in configurations.BAD}
    return int(any(counts[name] for name in configurations.BAD))


if __name__ == "__main__":
    sys.exit(main())
