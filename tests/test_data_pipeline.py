"""The benchmark of the data pipeline prints its figures."""

import json
import sys

from benchmarks import data_pipeline


def test_figures_of_both_pipelines(monkeypatch, capsys):
    options = "--compare plain --side 24 --batch-size 4 --batches 1 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["data_pipeline", *options.split()])
    monkeypatch.setattr(data_pipeline, "BUFFER", 10)
    data_pipeline.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["times plain"]) == {"ours", "plain"} and result["times plain"]["plain"] == 1
    assert min(result["samples/s a worker"].values()) > 0 and min(result["steps, us a sample"].values()) > 0
