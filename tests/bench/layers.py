"""The layers compiled for a CPU against PyTorch's, in the whole step: --kernels auto and off."""

from pathlib import Path

import click

from tests.bench import OUT
from tests.bench.child import measured
from tools.measure.results import Repetition
from tools.report.rows import Claim, Row, claim, row, write_result

Case = tuple[str, int, str]
"""Precision, batch, and first layer."""
CASES: tuple[Case, ...] = (
    ("bf16", 128, "whitened"),
    ("bf16", 128, "trained"),
    ("bf16", 512, "trained"),
    ("fp32", 512, "trained"),
)
ON, OFF = ["conv_pool_relu", "bias_pool_relu"], list[str]()


def bench(out: Path, rounds: int, num_steps: int) -> None:
    """Measure and write OUT/cpu_layers.json."""
    rates: dict[Case, tuple[list[float], list[float]]] = {case: ([], []) for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            for side, names in enumerate((OFF, ON)):
                found = with_layers(case, names, num_steps)
                rates[case][side].append(found.rate)
    rows, claims = list[Row](), list[Claim]()
    for case, (plain, fused) in rates.items():
        precision, batch, first_layer = case
        name = f"{precision}, batch {batch}, first layer {first_layer}"
        ratio = row(f"{name}: ratio", [b / a for a, b in zip(plain, fused, strict=True)], "x")
        rows.append(row(f"{name}: PyTorch's layers", plain, "samples/s"))
        rows += [row(f"{name}: compiled layers", fused, "samples/s"), ratio]
        wanted = 1.3 if (batch, first_layer) == (512, "trained") else 1.0
        claims.append(claim(f"{ratio.name} (x)", ratio.value, wanted))
    write_result(
        out / "cpu_layers.json",
        title="Pooled layers compiled for the CPU in the training step, two cores, resident feed",
        environment=found.facts,
        rows=rows,
        claims=claims,
    )


def with_layers(case: Case, names: list[str], num_steps: int) -> Repetition:
    """The fast step with these layers."""
    precision, batch, first_layer = case
    changed = {"step.precision": precision, "model.first_layer": first_layer, "kernels": names}
    return measured("rung_bf16", batch_size=batch, num_steps=num_steps, changed=changed)


@click.command()
@OUT
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=60, show_default=True)
def main(out: Path, rounds: int, steps: int) -> None:
    """Benchmark the compiled layers."""
    bench(out, rounds, steps)


if __name__ == "__main__":
    main()
