"""python3 -m tools.gpu: everything that only a GPU can show, as one offline command that leaves a folder of evidence.

First the tests marked gpu, then three rungs (eager fp32, bf16 channels-last, the same as one CUDA graph) at batch 64
and 2048. Needs no DALI, no CSV and no git: --npz trains straight from an archive of names (F,) and images (F, K, H, W).
"""

import subprocess
import sys
from pathlib import Path

import click
import numpy as np

from engine.config import RunConfig, load_toml, override
from engine.errors import UserError, exit_on_user_error
from engine.records import Records, Split, open_records
from engine.report import ROOT, Environment
from engine.sample import ensure_sample
from engine.split import draw_splits
from engine.trainer import open_session
from engine.world import World, start_world
from tools.bench.measure import measure
from tools.bench.results import row, to_markdown, write_result

RUNGS = ("rung_eager_fp32", "rung_bf16", "rung_graph")
BATCHES = (64, 2048)
REPETITIONS = 5
FIRST_CHARACTER = 33
"""images[:, 0] of the archive is '!'."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--npz", type=click.Path(path_type=Path), help="typefaces.npz.  [default: the packaged sample]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/gpu"), show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="Small batches, few steps, one repetition: proves the script.")
def main(npz: Path | None, out: Path, device: str, quick: bool) -> None:
    """Run the GPU tests and the ladder; write OUT/ladder.json, ladder.md and tests.txt. Exit 1 if a test failed."""
    with exit_on_user_error():
        out.mkdir(parents=True, exist_ok=True)
        passed = _run_tests(out / "tests.txt")
        with start_world(device) as world, world.on_stream():
            records = records_from_npz(npz) if npz else open_records(ensure_sample(world))
            facts, rows = _ladder(records, world, quick)
        title = f"Ladder of the step on one {facts.gpu_name or 'CPU'}"
        write_result(out / "ladder.json", title=title, environment=facts, rows=rows, claims=[])
        table = to_markdown({"title": title, "environment": vars(facts), "rows": rows, "claims": []}, "ladder.json")
        (out / "ladder.md").write_text(table)
        click.echo(table)
    raise SystemExit(0 if passed else 1)


def _run_tests(log: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", str(ROOT / "tests" / "test_gpu.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log.write_text(done.stdout + done.stderr)
    click.echo(f"gpu tests: {(done.stdout.strip().splitlines() or ['no output'])[-1]}")
    return done.returncode == 0


def _ladder(records: Records, world: World, quick: bool) -> tuple[Environment, list[dict[str, object]]]:
    rates: dict[str, list[float]] = {}
    batches, num_steps, repetitions = ((64, 128), 3, 1) if quick else (BATCHES, 100, REPETITIONS)
    for _ in range(repetitions):
        for batch in batches:
            for rung in RUNGS:
                config = load_toml(RunConfig(), ROOT / "bench_configs" / f"{rung}.toml")
                session = open_session(override(config, {"global_batch": batch}, rung), records, world)
                try:
                    rate = measure(session, num_steps).samples_per_s
                finally:
                    session.close()
                name = f"batch {batch}: {rung.removeprefix('rung_')}"
                if session.effective.get("fp32_convolutions") == "tf32":
                    name += ", TF32 convolutions (torch's default)"
                rates.setdefault(name, []).append(rate)
                facts = session.environment
    return facts, [row(name, values, "samples/s") for name, values in rates.items()]


def records_from_npz(path: Path) -> Records:
    """A random split of names (F,) and images (F, K, H, W) uint8, characters '!' and up; nothing is written.

    Raises:
        UserError: not such an archive.
    """
    try:
        with np.load(path) as archive:
            names, image_FKHW = archive["names"], archive["images"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is no archive of names and images ({error}); give typefaces.npz") from None
    num_fonts, num_classes, height, width = image_FKHW.shape
    classes = tuple(chr(FIRST_CHARACTER + k) for k in range(num_classes))
    everything = Split(
        image_NHW=image_FKHW.reshape(-1, height, width),
        label_N=np.tile(np.arange(num_classes, dtype=np.uint8), num_fonts),
        font_N=np.repeat(np.arange(num_fonts, dtype=np.int32), num_classes),
    )
    fonts = tuple(map(str, names))
    label_N, font_N = everything.label_N, everything.font_N
    rows = draw_splits(label_N, font_N, classes, fonts, mode="random", balance=False, seed=42)
    splits = {name: everything.take(row_M) for name, row_M in rows.items()}
    train_NHW = splits["train"].image_NHW
    return Records(
        splits=splits,
        classes=classes,
        fonts=fonts,
        fingerprint=f"npz of {num_fonts} typefaces",
        pixel_mean=float(train_NHW.mean()),
        pixel_std=float(train_NHW.std()),
        path=str(path),
    )


if __name__ == "__main__":
    main()
