"""The studies of benchmarks: tables and figures of made-up runs."""

import pytest

from examples.common import runs
from examples.studies import benchmarks, imagenet_elastic
from tests import sources
from tests.examples import made_up

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; returns the list of runs that were asked for."""
    asked = []

    def train(benchmark, model_dir, *arguments):
        asked.append((benchmark, *arguments))
        return made_up.train(benchmark, model_dir, *arguments)

    monkeypatch.setattr(runs, "train", train)
    return asked


class TestStudy:
    def test_every_algorithm_of_a_benchmark(self, tmp_path, trained, capsys):
        rows = benchmarks.main(["cifar10", f"--out={tmp_path}", "--seeds=0,1"])
        assert [row.algorithm for row in rows] == [
            "identity",
            "adascale",
            "linear",
            "sqrt",
            "lsw",
            "lsw_plus",
        ] * 2
        assert [row.scale for row in rows] == [1, 64, 64, 64, 64, 64] * 2
        # LSW+ is stretched to the iterations that AdaScale took.
        lsw_plus = [run for run in trained if "--algorithm=lsw_plus" in run]
        assert all("--iterations=40" in run for run in lsw_plus)
        assert benchmarks.table(rows) in capsys.readouterr().out
        assert (tmp_path / "benchmarks.png").read_bytes()[:8] == PNG

    def test_resumes(self, tmp_path, trained):
        first = benchmarks.main(["speech", f"--out={tmp_path}"])
        assert len(trained) == 6
        again = benchmarks.main(["speech", f"--out={tmp_path}"])
        assert again == first
        assert len(trained) == 6

    def test_results_are_read_back_as_written(self, tmp_path, trained):
        rows = benchmarks.main(["transformer", f"--out={tmp_path}"])
        assert benchmarks.read(tmp_path) == rows
        assert {row.value for row in rows} == {97.5}

    def test_several_scales_by_adamw(self, tmp_path, trained, capsys):
        arguments = ["adamw", f"--out={tmp_path}", "--seeds=3"]
        rows = benchmarks.main(arguments)
        assert [(row.algorithm, row.scale) for row in rows] == [
            ("identity", 1),
            ("adamscale", 8),
            ("sqrt", 8),
            ("linear", 8),
            ("adamscale", 32),
            ("sqrt", 32),
            ("linear", 32),
        ]
        for run in trained:
            assert run[0] == "transformer"
            assert {"--optimizer=adamw", "--seed=3"} < set(run)
        printed = capsys.readouterr().out
        # The plain optimizer is AdamW.
        assert "| adamw | AdamW | 1 | 40 | bleu 97.5 | - |" in printed
        assert "| adamw | AdamScale | 8 | 40 | bleu 97.5 | 3.5 |" in printed
        assert benchmarks.main(arguments) == rows
        assert len(trained) == 7

    def test_all_trainers_are_folders(self):
        for benchmark in benchmarks.BENCHMARKS.values():
            path = sources.ROOT / "examples" / benchmark.trainer / "train.py"
            assert path.exists()

    def test_unknown_benchmarks_are_refused(self, trained, capsys):
        with pytest.raises(SystemExit):
            benchmarks.main(["cifar11"])
        assert "no such benchmark: cifar11" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            benchmarks.main(["cifar10", "--algorithms=adam"])
        assert "no such algorithm: adam" in capsys.readouterr().err
        assert not trained

    def test_some_algorithms_only(self, tmp_path, trained):
        rows = benchmarks.main(
            ["yolo", f"--out={tmp_path}", "--algorithms=identity,adascale"]
        )
        assert [row.algorithm for row in rows] == ["identity", "adascale"]
        assert len(trained) == 2


def test_elastic_study_goes_up_and_down(tmp_path, trained, capsys):
    results = imagenet_elastic.main([f"--out={tmp_path}"])
    assert [run.result["scale"] for run in results.values()] == [
        1,
        "0:8,0.25:16,0.5:32",
        "0:8,0.25:16,0.5:32",
        "0:32,0.25:16,0.5:8",
        "0:32,0.25:16,0.5:8",
    ]
    assert runs.table(list(results.values())) in capsys.readouterr().out
    assert (tmp_path / "elastic.png").read_bytes()[:8] == PNG
