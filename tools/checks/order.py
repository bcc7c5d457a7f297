"""Did a run see the samples it should have, in their order, with the right pixels?

The evidence is what the run wrote with `--set log_ids=true` (engine/train/idlog.py).
"""

import zlib
from pathlib import Path

import numpy as np

from engine.config import RunConfig, load_toml
from engine.data.records import open_records
from engine.data.sample import sample_path
from engine.errors import UserError
from engine.report import read_report

ROWS_READ = 4096


def check_order(run: Path, data: str | None) -> tuple[int, list[str]]:
    """(samples checked, a sentence for each fault).

    Raises:
        UserError: RUN has no ids, or its records are others now.
    """
    from engine.train import idlog
    from engine.train.session import make_order

    report = read_report(run)
    config = load_toml(RunConfig(), run / "config.toml")
    records = open_records(
        data or config.data.path or sample_path(), in_memory=config.data.feed != "stream"
    )
    if records.fingerprint != report["dataset_fingerprint"]:
        raise UserError(f"{records.path}: are not the records of {run}; name them by --data")
    train = records.split("train")
    num_ranks = int(report["num_ranks"])
    faults = []
    checked = 0
    images = (
        train.image_NHW[start : start + ROWS_READ] for start in range(0, len(train), ROWS_READ)
    )
    crc_N = (
        None
        if config.augment.is_on
        else np.array([zlib.crc32(image) for part in images for image in part])
    )
    for epoch in range(int(report["num_epochs"])):
        seen = []
        for rank in range(num_ranks):
            planned = make_order(config, len(train), rank, num_ranks)
            path = idlog.path_of(run, rank, epoch)
            if not path.exists():
                raise UserError(
                    f"{run}: holds no ids of rank {rank}, epoch {epoch}; "
                    f"train it with --set log_ids=true"
                )
            id_SB, crc_SB = idlog.read(path, planned.rank_batch)
            where = f"epoch {epoch}, rank {rank}"
            if len(id_SB) != planned.steps_per_epoch:
                faults.append(f"{where}: {len(id_SB)} steps, want {planned.steps_per_epoch}")
                continue
            wrong_SB = id_SB != planned.ids(epoch, 0, len(id_SB))
            if wrong_SB.any():
                first = int(np.argwhere(wrong_SB)[0][0])
                faults.append(f"{where}: step {first} is the first that has other samples")
                continue
            if crc_N is not None and (wrong_SB := crc_N[id_SB] != crc_SB).any():
                step, row = np.argwhere(wrong_SB)[0]
                what = f"the image is not that of sample {id_SB[step, row]}"
                faults.append(f"{where}: step {step}, row {row}: {what}")
            seen.append(id_SB.reshape(-1))
            checked += id_SB.size
        if seen and len(np.unique(ids := np.concatenate(seen))) < len(ids):
            faults.append(f"epoch {epoch}: a sample came twice")
        if len(train) - sum(map(len, seen)) >= config.global_batch and not faults:
            faults.append(f"epoch {epoch}: more samples were left out than one batch less one")
    return checked, faults
