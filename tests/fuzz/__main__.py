"""Damage configurations, pictures and files of weights and tables at random; count how the project answers.

    python -m tests.fuzz --seed 0                       1000 configurations, 500 pictures, 500 other files
    python -m tests.fuzz --seed 0 --only 17             one configuration: what was read, with its traceback

The exit code is 1 after a traceback, after more than five seconds for one of them, or if anything was executed.
"""

import argparse
import sys
from collections import Counter

from tests.fuzz import configurations, files, pictures

GOOD = {"accepted", "DataError", "ok", "UserError"}  # read as it was, or refused in one line


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
    parser.add_argument("--files", type=int, default=500)
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
    wrong = any(counts[name] for name in configurations.BAD)
    for kind, module in (("pictures", pictures), ("files", files)):
        found = Counter(module.run(options.seed, getattr(options, kind)))
        print(f"{kind}: " + ", ".join(f"{number} {name}" for name, number in found.items()))
        wrong |= any(number for name, number in found.items() if name not in GOOD)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
