"""Tells what is installed here, what works, and which backend each part of the model would use.

    python -m megatron_moe.doctor
    python -m megatron_moe.doctor --json

Exit code 0 if training can run here, else 1 with the reason.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from megatron_moe import __version__
from megatron_moe.runtime.doctor import Report, examine
from megatron_moe.runtime.quiet import silence_third_party_warnings


def render(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [f"megatron_moe {__version__}", ""]
    for finding in report.findings:
        lines.append(f"{finding.state:8} {finding.name:19} {finding.detail}")
        if finding.advice:
            lines.append(f"{'':8} {'':19} -> {finding.advice}")
    if report.backends:
        lines += ["", f"What each part of the model uses on {report.device} with default flags:"]
        lines += [f"  {each.part:15} {each.backend:47} {each.why}" for each in report.backends]
    lines.append("")
    if report.reasons:
        lines += [f"Training cannot run here. {reason}" for reason in report.reasons]
    else:
        lines.append(f"Training can run here, on {report.device}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit code says whether training can run."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_moe.doctor", description="What can run here, and on what."
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args(arguments)
    silence_third_party_warnings()
    report = examine()
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if options.json else render(report))
    return 1 if report.reasons else 0


if __name__ == "__main__":
    sys.exit(main())
