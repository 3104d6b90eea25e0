"""Draw a run: its losses, its speed, and how its experts share the tokens.

    python tools/plot_run.py runs/demo
    python tools/plot_run.py runs/demo --output demo.png --unigram-entropy 7.14

reads metrics.jsonl and expert_load.jsonl of a run's directory (the --save of training) and writes a picture and, beside
it, a page: one HTML file with the same charts, where a slider moves the map of layers x experts through time. Open it
in any browser; it needs no network. In maps white is an even share; blue experts get less than that, red ones more.
The picture needs matplotlib: pip install matplotlib
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.data.command_line import ToolParser, run_tool
from megatron_moe.data.files import atomic_file
from megatron_moe.training.run_report.history import LoadHistory, Series, read_loads, read_metrics
from megatron_moe.training.run_report.page import render_page


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, read the run, write picture and page."""
    parser = ToolParser(__doc__)
    parser.add_argument("given", type=Path, nargs="?", metavar="RUN", help="a run's directory")
    parser.add_argument("--run", type=Path, metavar="RUN", help="the same, as a flag")
    parser.add_argument("--output", type=Path, metavar="PNG", help="the picture; default: RUN/training.png")
    parser.add_argument("--page", type=Path, metavar="HTML", help="the page; default: as the picture, but .html")
    parser.add_argument("--page-only", action="store_true", help="write no picture, which needs no matplotlib")
    parser.add_argument(
        "--unigram-entropy",
        type=float,
        metavar="NATS",
        help="draw a line at the loss of guessing by frequency alone",
    )
    args = parser.parse_tool_args(argv)
    if (args.given is None) == (args.run is None):
        parser.error("give one run's directory")
    run: Path = args.given or args.run
    picture: Path = args.output or run / "training.png"
    page: Path = args.page or picture.with_suffix(".html")
    if page == picture:
        raise UserError(f"--output {picture}: is the page's name too; give another, such as {picture.stem}.png")
    if not args.page_only:
        _require_matplotlib()
    metrics, loads = read_metrics(run / "metrics.jsonl"), read_loads(run / "expert_load.jsonl")
    title = run.resolve().name
    if not args.page_only:
        _write_picture(picture, metrics, loads, title, args.unigram_entropy)
    with atomic_file(page, f"--page {page}") as stream:
        stream.write(render_page(metrics, loads, title, args.unigram_entropy).encode())
    written = f"{page}" if args.page_only else f"{picture}, {page}"
    print(f"{written}: {len(metrics['lm_loss'])} steps, {len(loads.experts)} MoE layers")


def _require_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plot_run needs matplotlib: pip install matplotlib, or give --page-only") from error
    matplotlib.use("Agg")


def _write_picture(
    path: Path, metrics: dict[str, Series], loads: LoadHistory, title: str, unigram_entropy: float | None
) -> None:
    from megatron_moe.training.run_report.picture import draw

    figure = draw(metrics, loads, title, unigram_entropy)
    with atomic_file(path, f"--output {path}") as stream:
        figure.savefig(stream, format="png")


if __name__ == "__main__":
    run_tool(main)
