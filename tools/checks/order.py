"""Did a run see the samples it should have, in their order, with the right pixels?

The evidence is what the run wrote with `--set log_ids=true` (engine/train/idlog.py).

Shapes: N images of the train split, S steps of a rank's batches of B samples.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.config import RunConfig
from engine.config_text import load_toml
from engine.data.records import Split, open_records
from engine.data.sample import sample_path
from engine.errors import UserError
from engine.feeds.build import make_order
from engine.report import read_report
from engine.train import idlog

ROWS_READ = 4096


def check_order(run: Path, data: str | None) -> tuple[int, list[str]]:
    """(samples checked, a sentence for each fault).

    Raises:
        UserError: RUN has no ids, or its records are others now.
    """
    report = read_report(run)
    config = load_toml(RunConfig(), run / "config.toml")
    path = data or config.data.path or sample_path()
    records = open_records(path, in_memory=config.data.feed != "stream")
    if records.fingerprint != report.dataset_fingerprint:
        raise UserError(f"{records.path}: are not the records of {run}; name them by --data")
    image_NHW = records.split("train").image_NHW
    crc_N = None if config.augment.is_on else _checksums(image_NHW)
    faults: list[str] = []
    checked = 0
    batch_of = {each.epoch - 1: each.global_batch for each in report.batches}
    for epoch in range(report.num_epochs):
        config = replace(config, global_batch=batch_of.get(epoch, config.global_batch))
        id_X = _check_epoch(run, epoch, Planned(config, records.split("train"), crc_N), faults)
        checked += len(id_X)
        if len(np.unique(id_X)) < len(id_X):
            faults.append(f"epoch {epoch}: a sample came twice")
        if len(image_NHW) - len(id_X) >= config.global_batch and not faults:
            faults.append(f"epoch {epoch}: more samples were left out than one batch less one")
    return checked, faults


def _checksums(image_NHW: np.ndarray) -> np.ndarray:
    starts = range(0, len(image_NHW), ROWS_READ)
    parts = (image_NHW[start : start + ROWS_READ] for start in starts)
    return np.array([zlib.crc32(image) for part in parts for image in part])


@dataclass(frozen=True)
class Planned:
    """What a run should have seen."""

    config: RunConfig
    split: Split
    crc_N: np.ndarray | None
    """Of the stored images; None where training distorted them."""


def _check_epoch(run: Path, epoch: int, planned: Planned, faults: list[str]) -> np.ndarray:
    """The ids of all ranks that are the order's; what is wrong goes into `faults`."""
    seen = [np.empty(0, np.int64)]
    pieces = idlog.pieces(run, epoch)
    if not pieces or pieces[0].first_step:
        remedy = "train it with --set log_ids=true"
        raise UserError(f"{run}: holds no ids of epoch {epoch} from its first step on; {remedy}")
    for piece in pieces:
        if len(piece.paths) != piece.num_ranks:
            what = f"holds ids of {len(piece.paths)} of {piece.num_ranks} ranks for epoch {epoch}"
            raise UserError(f"{run}: {what}; bring the others' files to OUT/ids too")
        for rank, path in enumerate(piece.paths):
            order = make_order(planned.config, planned.split, rank, len(piece.paths))
            last_step = piece.last_step or order.steps_per_epoch
            num_steps = last_step - piece.first_step
            id_SB, crc_SB = (x_SB[:num_steps] for x_SB in idlog.read(path, order.rank_batch))
            where = f"epoch {epoch}, {path.stem.split('-')[-1]}"
            if fault := _fault_of_ids(id_SB, order.ids(epoch, piece.first_step, num_steps)):
                faults.append(f"{where}: {fault}")
                continue
            if fault := _fault_of_images(id_SB, crc_SB, planned.crc_N):
                faults.append(f"{where}: {fault}")
            seen.append(id_SB.reshape(-1))
    return np.concatenate(seen)


def _fault_of_ids(id_SB: np.ndarray, wanted_SB: np.ndarray) -> str:
    if len(id_SB) != len(wanted_SB):
        return f"{len(id_SB)} steps, want {len(wanted_SB)}"
    wrong_SB = id_SB != wanted_SB
    if not wrong_SB.any():
        return ""
    return f"step {np.argwhere(wrong_SB)[0][0]} is the first that has other samples"


def _fault_of_images(id_SB: np.ndarray, crc_SB: np.ndarray, crc_N: np.ndarray | None) -> str:
    if crc_N is None:
        return ""
    wrong_SB = crc_N[id_SB] != crc_SB
    if not wrong_SB.any():
        return ""
    step, row = np.argwhere(wrong_SB)[0]
    return f"step {step}, row {row}: the image is not that of sample {id_SB[step, row]}"
