"""tools/profile: what a configuration does to throughput and memory. Bare: the default configuration, fast settings on.

Every figure comes from the TrainStep and feeds of training (tools/bench/measure.py).
"""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from engine.config import RunConfig, load_toml, override
from engine.errors import exit_on_user_error
from engine.publish import writing
from engine.report import read_report

SHOWN = {
    "config": "config",
    "samples_per_s": "samples/s",
    "step_ms": "step ms",
    "step_p10_ms": "p10",
    "step_p90_ms": "p90",
    "data_wait_fraction": "waiting",
    "host_peak_rss_gib": "host GiB",
    "torch_peak_gib": "torch GiB",
    "device_used_gib": "device GiB",
    "gpu_utilisation_percent": "GPU %",
    "power_w": "W",
    "energy_j": "J",
}


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """Measure training: throughput, step times, waiting for data, memory, power."""
    if context.invoked_subcommand is None:
        context.invoke(run)


@main.command()
@click.argument("configs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--data", help="Record directory.  [default: the sample]")
@click.option("--steps", type=click.IntRange(2), default=100, show_default=True, help="Timed steps of each config.")
@click.option("--batch-size", type=click.IntRange(1), help="Samples of one rank in a step, for every config.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for profile.json and .csv.  [default: runs/profile-<time>]"
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None)
def run(
    configs: tuple[Path, ...] = (),
    data: str | None = None,
    steps: int = 100,
    batch_size: int | None = None,
    out: Path | None = None,
    device: str | None = None,
) -> None:
    """Profile CONFIG files (bench_configs/*.toml), each through the step and feed of training."""
    from engine.world import end_rank, env_rank, env_world_size

    with exit_on_user_error(speak=env_rank() == 0):
        named = [(path.stem, load_toml(RunConfig(), path)) for path in configs] or [("default", default_config())]
        common: dict[str, Any] = {"data.path": data} if data else {}
        if batch_size:
            common["global_batch"] = batch_size * env_world_size()
        named = [(name, override(config, common, "flags")) for name, config in named]
        rows, facts = _profile_all(named, steps, device or "")
        if env_rank() == 0:
            _show(rows, facts, out or Path("runs") / time.strftime("profile-%Y%m%d-%H%M%S", time.gmtime()))
    end_rank()


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for comparison.md and comparison.json, too.")
def compare(a: Path, b: Path, out: Path | None) -> None:
    """Put the reports of two runs, A and B, side by side."""
    with exit_on_user_error():
        reports = {a.name: read_report(a), b.name: read_report(b)}
        table = comparison(reports[a.name], reports[b.name], a.name, b.name)
        click.echo(table)
        if out:
            with writing(out):
                (out / "comparison.md").write_text(f"# {a.name} and {b.name}\n\n{table}\n")
                _write_comparison(out / "comparison.json", reports)
            click.echo(f"report: {out / 'comparison.md'}")


@main.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="Records; best packed with --split none.  [default: the sample]"
)
@click.option("--batch-size", default=2048, show_default=True, type=click.IntRange(1), help="Samples of a batch.")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(0.1), help="For each feed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there, too.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/feeds"), show_default=True)
def feeds(data: Path | None, batch_size: int, seconds: float, json_file: Path | None, out: Path) -> None:
    """Measure what every feed carries, and torch's TensorDataset, without a step; a table and a bar chart."""
    with exit_on_user_error():
        from tools.bench.feeds import profile_feeds

        click.echo(profile_feeds(data, batch_size, seconds, json_file, out))


def _write_comparison(path: Path, reports: dict[str, dict[str, Any]]) -> None:
    from engine.report import Environment
    from tools.bench.results import row, write_result

    rows = []
    for name, report in reports.items():
        rows.append(row(f"{name}, {report['num_epochs']} epochs: training time", [report["train_s"]], "s"))
        rows.append(row(f"{name}: throughput", [report["samples_per_s"]], "samples/s"))
        rows.append(row(f"{name}: test accuracy", [100 * report["test_accuracy_fraction"]], "%"))
    facts = Environment(**report["environment"])
    title = (
        f"{path.parent.name}: {' and '.join(reports)}, {report['num_train_samples']:,} training images, one run each"
    )
    write_result(path, title=title, environment=facts, rows=rows, claims=[])


def default_config() -> RunConfig:
    """What `torchrun -m engine.run --amp --cuda-graphs` trains with."""
    config = RunConfig()
    return replace(config, step=replace(config.step, precision="bf16", cuda_graphs=True))


def _profile_all(
    named: list[tuple[str, RunConfig]], steps: int, device: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from engine.feeds import open_for
    from engine.sample import ensure_sample
    from engine.trainer import open_session
    from engine.world import start_world
    from tools.bench.measure import profile_session

    rows, facts = [], {}
    with start_world(device) as world, world.on_stream():
        sample = ensure_sample(world) if any(not config.data.path for _, config in named) else ""
        opened: dict[tuple[str, bool], Any] = {}
        for name, config in named:
            path, on_disk = config.data.path or str(sample), config.data.feed == "stream"
            records = opened[path, on_disk] = opened.get((path, on_disk)) or open_for(config.data, path)
            session = open_session(config, records, world)
            try:
                rows.append({"config": name} | profile_session(session, steps))
            finally:
                session.close()
            facts = asdict(session.environment)
    return rows, facts


def _show(rows: list[dict[str, Any]], facts: dict[str, Any], out: Path) -> None:
    import pandas as pd

    from engine.report import write_json

    frame = pd.DataFrame(rows)
    shown = frame[list(SHOWN)].dropna(axis="columns", how="all").rename(columns=SHOWN)
    formats = {"samples/s": "{:,.0f}".format, "waiting": "{:.1%}".format}
    click.echo(shown.to_string(index=False, float_format="{:.2f}".format, formatters=formats))  # type: ignore[call-overload]
    for note in sorted({note for note in frame["notes"] if note}):
        click.echo(f"note: {note}")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json({"environment": facts, "rows": rows}, out / "profile.json")
        frame.to_csv(out / "profile.csv", index=False)
    click.echo(f"written: {out / 'profile.json'}, {out / 'profile.csv'}")


def comparison(a: dict[str, Any], b: dict[str, Any], name_a: str, name_b: str) -> str:
    """Two run reports as a Markdown table; the ratio is told where more is better or less is better."""
    lines = [f"| | {name_a} | {name_b} | {name_b} is |", "|---|--:|--:|---|"]
    measures = [
        ("training time (s)", "train_s", "{:.2f}", -1),
        ("samples/s", "samples_per_s", "{:,.0f}", 1),
        ("test accuracy", "test_accuracy_fraction", "{:.2%}", 0),
        ("best validation accuracy", "val_accuracy_fraction", "{:.2%}", 0),
        ("waiting for data", "data_wait_fraction", "{:.1%}", None),
        ("epochs", "num_epochs", "{}", None),
        ("global batch", "global_batch", "{}", None),
        ("precision", "precision", "{}", None),
        ("feed", "feed", "{}", None),
        ("CUDA graphs", "cuda_graphs", "{}", None),
        ("peak host memory (GiB)", "host_peak_rss_gib", "{:.2f}", None),
        ("peak GPU memory of torch (GiB)", "torch_peak_gib", "{:.2f}", None),
    ]
    flat_a, flat_b = ({**r["config"], **r["effective"], **r} for r in (a, b))
    for title, key, form, better in measures:
        x, y = flat_a[key], flat_b[key]
        if x is None or y is None:
            continue
        verdict = ""
        if better == 0:
            verdict = f"{100 * (y - x):+.2f} points"
        elif better and x and y:
            verdict = f"{(y / x) ** better:.1f} x faster"
        lines.append(f"| {title} | {form.format(x)} | {form.format(y)} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
