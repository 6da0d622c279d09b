"""What a person with two models and a parquet file of problems writes before the first distillation."""

import json
import shutil
from pathlib import Path

import pyarrow
from pyarrow import parquet

from opd import train
from opd.config import load_config

PAIR = Path("data/tiny/pairs/chain")


def number_of_keys(section):
    return sum(number_of_keys(value) if isinstance(value, dict) else 1 for value in section.values())


def test_two_models_and_a_parquet_file_are_distilled_with_eight_keys(tmp_path):
    for name in ("student", "teacher"):  # any two Hugging Face folders; these have a context like real models
        shutil.copytree(PAIR / name, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8192}))
    rows = [json.loads(line) for line in (PAIR / "train.jsonl").read_text().splitlines()[:16]]
    table = [{"question": row["problem"], "answer": int(row["answer"]), "source": "mine"} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "problems.parquet")
    written = {
        "extends": str(Path("configs/qwen3_1.7b_to_0.6b.json").resolve()),
        "student": {"path": str(tmp_path / "student")},
        "teacher": {"path": str(tmp_path / "teacher")},
        "data": {"train": [str(tmp_path / "problems.parquet")], "prompt_field": "question"},
        "eval": {"benchmarks": []},
        "run_name": "mine",
        "output_dir": str(tmp_path / "outputs"),
    }
    assert number_of_keys(written) <= 8
    (tmp_path / "mine.json").write_text(json.dumps(written))
    config, _ = load_config(tmp_path / "mine.json", [])
    folder = train.run(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/divergence" in line] == [1, 2]  # 16 problems, 8 in an update
    assert (folder / "checkpoints").is_dir()
