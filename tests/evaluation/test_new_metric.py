"""A new metric is one class and one row: everything that shows metrics knows it."""

from __future__ import annotations

import json

import numpy as np
import torch
from helpers.tiny import digits, digits_data, events, ncsn, run_logger, trainer

from lit_diffusion.__main__ import dispatch
from lit_diffusion.callbacks import EMA, Evaluator
from lit_diffusion.metrics import RealData, SampleMetric, Value
from lit_diffusion.metrics.catalogue import CATALOGUE, Panel, Row, better, dashboard_rows, metrics_table
from lit_diffusion.metrics.gathering import RowsMetric
from lit_diffusion.plots.panels import metric_panels
from lit_diffusion.runs.events import read_run


class MeanNorm(RowsMetric, SampleMetric):
    """The mean Euclidean norm of the features."""

    @classmethod
    def of(cls, names, subject):
        return cls()

    def take(self, seen):
        self.update(seen.features.norm(dim=1, keepdim=True), seen.index)

    def values(self, total):
        return {"mean_norm": Value(float(self.all_rows().mean()))}


ROW = Row("mean_norm", f"{__name__}.MeanNorm", "min", Panel("Mean norm", "It should not rise."))


def test_it_appears_wherever_metrics_do(tmp_path, monkeypatch):
    monkeypatch.setitem(CATALOGUE, "mean_norm", ROW)
    # `test`, and what it writes.
    method, data = ncsn(), digits_data()
    evaluator = Evaluator(
        test_samples=16, test_seeds=(0, 1), batch_size=16, weights="raw", metrics=["mean_norm"], best="mean_norm"
    )
    made = trainer(tmp_path, 32, callbacks=[EMA([]), evaluator], logger=run_logger(tmp_path, method))
    made.test(method, datamodule=data, verbose=False)
    run = tmp_path / "run"
    first, second = events(run, "evaluation")
    (summary,) = events(run, "test")
    values = [first["mean_norm/digits-16"], second["mean_norm/digits-16"]]
    assert summary["mean_norm/digits-16/mean"] == sum(values) / 2
    kept = np.load(run / first["samples_file"])["arr_0"]
    assert kept.shape == (16, 8, 8, 1)
    # `evaluate`, by default, of the same samples.
    np.savez(tmp_path / "real.npz", arr_0=RealData.of(digits(), torch.arange(60), "all").values(torch.arange(60)))
    np.savez(tmp_path / "samples.npz", arr_0=kept)
    out = tmp_path / "out.json"
    dispatch(
        ["evaluate", "--samples", f"{tmp_path}/samples.npz", "--reference", f"{tmp_path}/real.npz", "--out", f"{out}"]
    )
    assert json.loads(out.read_text())["values"]["mean_norm/digits-16"] == values[0]
    # The report, the dashboard's best value and the pages of the documentation.
    (panel,) = [panel for panel in metric_panels(read_run(run)) if panel.title == "Mean norm: digits-16"]
    assert panel.hint == "It should not rise."
    assert list(panel.curves) == ["mean_norm, protocol 1", "mean_norm, protocol 2"]  # Of two seeds.
    assert better("mean_norm/digits-16") == "min"
    assert "| `mean_norm` | `mean_norm` | lower |" in metrics_table()
    assert "`^evaluation/mean_norm[-/]`" in dashboard_rows()
