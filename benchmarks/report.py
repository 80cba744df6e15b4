"""Write the last results into benchmarks/README.md, between its two marks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.machine import in_one_line
from common.options import RESULTS
from common.results import read_result
from common.tables import markdown

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"
BENCHMARKS = (
    "prefill",
    "decode",
    "generate",
    "train",
    "train_5m",
    "scan",
    "ssd",
    "memory",
    "runtime",
    "context",
    "start",
    "install",
    "arm_instructions",
    "instruction_sets",
    "gpu",
    "gpu_instructions",
    "dropin",
    "distributed",
    "accuracy",
)


def main() -> int:
    """Read the command line, replace what stands between the marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python benchmarks/report.py"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=README, help="the file to write into")
    arguments = parser.parse_args()
    text = arguments.readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{arguments.readme} lacks the marks {BEGIN} and {END}", file=sys.stderr)
        return 1
    parts = [section(arguments.results, name) for name in BENCHMARKS]
    body = "\n\n".join([BEGIN, *parts, END])
    arguments.readme.write_text(f"{before}{body}{after}", encoding="utf-8")
    print(f"{arguments.readme}: results written")
    return 0


def section(folder: Path, name: str) -> str:
    """One script's tables, or that it has not run."""
    result = read_result(folder, name)
    if result is None:
        return f"### {name}\n\nNot measured yet: `python benchmarks/{name}.py`."
    head = [f"### {name}", f"{result['date']}: {in_one_line(result['machine'])}"]
    return "\n\n".join(head + [markdown(table) for table in result["tables"]])


if __name__ == "__main__":
    sys.exit(main())
