"""Tables: what is read and refused, and runs on rows from the command line."""

import json
import sys

import numpy as np
import pytest
import torch

import fastflow
from fastflow import checkpoint
from fastflow.trainer import data
from fastflow.trainer.cli import main
from fastflow.trainer.data import DataError
from fastflow.trainer.progress import read_metrics

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

SMALL = (
    "--steps-per-level 2 --hidden 8 --batch-size 32 --warmup 2 --eval-every 4 --samples 50 --lr 3e-3".split()
)


def moons(n=200, seed=0):
    """Rows (a, b, which): two half circles of very different units, and the number of the half, with noise."""
    rng = np.random.default_rng(seed)
    angle, which = rng.uniform(0, np.pi, n), rng.integers(0, 2, n)
    sign = 1 - 2 * which
    a = sign * np.cos(angle) + which + 0.05 * rng.normal(size=n)
    b = sign * np.sin(angle) + 0.5 * which + 0.05 * rng.normal(size=n)
    return np.stack([1e3 * a, 1e-3 * b + 1, which + 0.1 * rng.normal(size=n)], axis=1)


def write(path, rows, header="a,b,which"):
    lines = [",".join(repr(float(value)) for value in row) for row in rows]
    path.write_text("\n".join([*([header] if header else []), *lines]) + "\n")
    return str(path)


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "moons.csv", moons())


def test_a_csv_is_split_into_columns_and_rows(table):
    rows = moons()
    source = data.load(table, columns="b,a", context="which", dtype=torch.float64)
    held_out = np.arange(200) % 10 == 9
    assert source.name == "moons" and source.shape == (2,) and source.context_features == 1
    assert np.array_equal(source.test.numpy(), rows[held_out][:, [1, 0]])
    assert np.array_equal(source.test_labels.numpy(), rows[held_out][:, [2]])
    data.set_validation(source, 0.1, 0)
    assert source.length == 162 and source.validation.shape == (18, 2)
    x, context = data.Batches(source, 162, seed=0)[0]
    found = np.concatenate(
        [torch.cat([x, context], 1), torch.cat([source.validation, source.validation_labels], 1)]
    )
    assert np.array_equal(
        found[np.lexsort(found.T)], rows[~held_out][:, [1, 0, 2]][np.lexsort(rows[~held_out][:, [1, 0, 2]].T)]
    )
    assert data.load(table).shape == (3,) and data.load(table).test.dtype == torch.float32
    assert data.load(table, context="which").columns == data.Columns(("a", "b"), ("which",))


def test_delimiters_quotes_and_files_without_a_header(tmp_path, table):
    expected = data.load(table).test
    rows = moons()
    texts = {
        "semicolons.csv": "\ufeffa;b;which\r\n"
        + "".join(";".join(map(repr, map(float, r))) + "\r\n" for r in rows),
        "tabs.csv": "".join("\t".join(map(repr, map(float, r))) + "\n\n" for r in rows),
        "quotes.csv": '"a, in mm",b,"c"\n'
        + "".join(",".join(f'"{v!r}"' for v in map(float, r)) + "\n" for r in rows),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        assert torch.equal(data.load(str(tmp_path / name)).test, expected), name
    assert data.load(str(tmp_path / "tabs.csv")).columns.x == ("0", "1", "2")
    assert data.load(str(tmp_path / "quotes.csv")).columns.x[0] == "a, in mm"


def test_arrays(tmp_path, table):
    rows, path = moons(), tmp_path / "rows.npy"
    np.save(path, rows.astype(np.float32))
    source = data.load(str(path), columns="2,0", context="1")
    assert source.columns == data.Columns(("2", "0"), ("1",))
    assert torch.equal(source.test, data.load(table, columns="which,a").test)
    path = tmp_path / "rows.npz"
    parts = {
        "x_test": rows[:20, :2],
        "context_test": rows[:20, 2:],
        "x_val": rows[:9, :2],
        "context_val": rows[:9, 2:],
    }
    np.savez(path, x=rows[:, :2], context=rows[:, 2:], **parts)
    source = data.load(str(path))
    assert source.columns == data.Columns(("0", "1"), ("context0",))
    assert (source.length, len(source.test), len(source.validation)) == (200, 20, 9)
    assert data.load(str(path), columns="0,1,context0").context_features is None
    np.savez(path, rows)
    assert data.load(str(path)).shape == (3,)


def test_parquet(tmp_path, table):
    parquet = pytest.importorskip("pyarrow.parquet", reason=".parquet files need pyarrow")
    table_of = pytest.importorskip("pyarrow").table
    rows, path = moons(), tmp_path / "rows.parquet"
    columns = {name: rows[:, i] for i, name in enumerate(("a", "b", "which"))} | {
        "id": [f"r{i}" for i in range(200)]
    }
    parquet.write_table(table_of(columns), path)
    source = data.load(str(path), columns="b", context="a")
    assert torch.equal(source.test, data.load(table, columns="b", context="a").test)
    with pytest.raises(DataError, match="column id, row 1: got 'r0', expected a finite number"):
        data.load(str(path))
    columns["a"] = [None, *rows[1:, 0]]
    parquet.write_table(table_of(columns), path)
    with pytest.raises(DataError, match="column a, row 1: got nan, expected a finite number"):
        data.load(str(path), columns="a,b")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read as .parquet"):
        data.load(str(path))
    with pytest.raises(DataError, match="none.parquet: no such file"):
        data.load(str(tmp_path / "none.parquet"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"rows.parquet: .parquet files need pyarrow: pip install fastflow-torch\[parquet\]"
    ):
        data.load(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize(
    "text, options, words",
    [
        ("", {}, "got an empty file, expected a header and rows of numbers"),
        ("a,b\n", {}, "got no rows"),
        ("a,b\n1,2\n", {}, "got 1 row, expected at least 4"),
        ("a,b\n1,2\n3\n", {}, "row 2: got 1 field, expected 2 as in the first line"),
        ("a,b\n1,2\n3,4,5\n", {}, "row 2: got 3 fields, expected 2"),
        (
            "a,b\n1,2\n3,x\n",
            {},
            "column b, row 2: got 'x', expected a finite number; --columns chooses other columns",
        ),
        ("a,b\n1,2\n3,\n", {}, "column b, row 2: got '', expected a finite number"),
        ("a,b\n1,2\n3,nan\n", {}, "column b, row 2: got nan, expected a finite number"),
        ("a,b\ninf,2\n3,4\n", {}, "column a, row 1: got inf, expected a finite number"),
        (
            "a,b\n" + "1,7\n2,7\n" * 4,
            {},
            "column b: got 7 in all 7 training rows, expected values that differ",
        ),
        ("a,b\n" + "1,2\n2,3\n" * 4, {"columns": "a,c"}, "columns: got 'c', expected columns of .*: a, b"),
        ("a,b\n" + "1,2\n2,3\n" * 4, {"columns": "a,a"}, "columns: got 'a' twice"),
        (
            "a,b\n" + "1,2\n2,3\n" * 4,
            {"columns": "a", "context": "a"},
            "context: got 'a', which is in columns too",
        ),
        (
            "a,b\n" + "1,2\n2,3\n" * 4,
            {"context": "a,b"},
            "context: got all columns; expected columns other than",
        ),
        ("a,a\n" + "1,2\n2,3\n" * 4, {}, "got two columns of one name in a, a"),
        (
            "a,a\n" + "1,2\n2,3\n" * 4,
            {"columns": "a"},
            "columns: got 'a', expected columns of .* that occur once",
        ),
        (
            "a,b\n" + "1,1e9\n2,1000000001\n" * 4,
            {},
            r"column b: got values 1e\+09 \+- 0.49.*equal up to rounding in",
        ),
    ],
)
def test_tables_that_cannot_be_used(text, options, words, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        data.load(str(path), **options)
    assert "\n" not in str(caught.value)


def test_files_and_arrays_that_cannot_be_used(tmp_path):
    rows = moons()
    (tmp_path / "latin.csv").write_bytes("größe,b\n1,2\n".encode("latin-1"))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    np.save(tmp_path / "one.npy", rows[:, 0])
    np.savez(tmp_path / "widths.npz", x=rows, x_test=rows[:, :2])
    np.savez(tmp_path / "context.npz", x=rows, context=rows[:, :1], x_test=rows)
    np.savez(tmp_path / "lengths.npz", x=rows, context=rows[:7, :1])
    for name, words in {
        "latin.csv": "cannot be read as CSV in UTF-8",
        "none.csv": "no such file",
        "none.npy": "no such file",
        "objects.npy": "cannot be read as .npy",
        "text.npy": "x: got <U1 of shape .1, 2., expected numbers of shape .rows, columns.",
        "one.npy": "x: got float64 of shape .200., expected numbers",
        "widths.npz": "x_test: got 2 columns, expected 3 as in x",
        "context.npz": "got no array context_test, expected one with the context of x_test",
        "lengths.npz": "context: got 7 rows, expected 200 as in x",
    }.items():
        with pytest.raises(DataError, match=words):
            data.load(str(tmp_path / name))


def test_notes_name_what_flatters_a_density(tmp_path):
    rows = moons()
    rows[:, 2] = rows[:, 2].round()
    rows[9] = rows[0]
    source = data.load(write(tmp_path / "r.csv", rows))
    repeated, again = source.notes
    assert (
        "columns whose values repeat: which (" in repeated
        and "distinct)" in repeated
        and "a (" not in repeated
    )
    assert again.startswith("1 row outside the training set equal")
    assert data.load(write(tmp_path / "r.csv", rows), context="which").notes == (again,)
    assert data.load(write(tmp_path / "r.csv", moons())).notes == ()


def test_a_run_on_rows(table, tmp_path, capsys):
    """A conditional run: files, units, resume bit for bit, evaluate and sample from the checkpoint only."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    argv = [
        "train",
        "--data",
        table,
        "--columns",
        "b,a",
        "--context",
        "which",
        *SMALL,
        "--schedule",
        "constant",
    ]
    argv += ["--save-every", "3", "--ema", "0.9", "--reversible", "no"]
    assert main([*argv, "--steps", "8", "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "162 rows of moons, 18 for validation, cpu" in printed and "step 4: train " in printed
    assert {f.name for f in whole.iterdir() if not f.name.startswith("events")} == {
        *(".lock", "last.pt", "best.pt", "metrics.csv", "samples.png", "curve.png", "result.json")
    }
    rows = read_metrics(whole / "metrics.csv")
    assert list(rows[0]) == ["step", "epoch", "lr", "train_nats", "grad_norm", "validation_nats"]
    result = json.loads((whole / "result.json").read_text())
    assert list(result) == ["model", "step", "test_rows", "test_nats", "validation_nats", "validation_rows"]

    # the checkpoint alone takes raw rows
    model, raw = fastflow.load(whole), moons()[9::10].astype(np.float32)
    x, context = torch.from_numpy(raw[:, [1, 0]]), torch.from_numpy(raw[:, [2]])
    assert -model.log_prob(x, context).mean().item() == pytest.approx(result["test_nats"], abs=1e-4)
    assert model.standardize.scale[1] > 500 and abs(model.standardize_context.mean) < 1

    assert main([*argv, "--steps", "4", "--out", str(part)]) == 0
    assert main(["train", "--resume", str(part), "--steps", "8"]) == 0
    assert (part / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert (part / "result.json").read_bytes() == (whole / "result.json").read_bytes()

    capsys.readouterr()
    assert main(["evaluate", str(whole)]) == 0
    assert capsys.readouterr().out.strip() in printed
    other = write(tmp_path / "other.csv", moons(seed=1)[:50, ::-1], "which,b,a")
    assert main(["evaluate", str(whole), "--data", other]) == 0
    assert "mean of 50 test rows" in capsys.readouterr().out

    given = write(tmp_path / "given.csv", [[5, 0.0], [6, 1.0], [7, 1.0]], "x,which")
    out = tmp_path / "samples.csv"
    for n, expected in (([], 3), (["--n", "5"], 5)):
        assert main(["sample", str(whole), "--context", given, "--out", str(out), *n]) == 0
        lines = out.read_text().splitlines()
        assert lines[0] == "b,a,which" and len(lines) == expected + 1
        assert [float(line.split(",")[2]) for line in lines[1:]] == [0.0, 1.0, 1.0, 0.0, 1.0][:expected]
    assert main(["sample", str(whole), "--context", given, "--n", "5", "--out", str(tmp_path / "s.npy")]) == 0
    found = np.load(tmp_path / "s.npy")
    assert np.array_equal(found, np.loadtxt(out, delimiter=",", skiprows=1, dtype=np.float32))


def test_without_context_in_float64(tmp_path, capsys):
    rows, run = moons(60), tmp_path / "run"
    np.save(tmp_path / "rows.npy", rows)
    argv = [
        "train",
        "--data",
        str(tmp_path / "rows.npy"),
        *SMALL,
        "--steps",
        "2",
        "--out",
        str(run),
        "--float64",
    ]
    assert main([*argv, "--columns", "0,1", "--validation", "0"]) == 0
    contents = checkpoint.read(run / "last.pt")
    assert contents["state_dict"]["standardize.mean"].dtype == torch.float64
    held_out = np.arange(60) % 10 == 9
    torch.testing.assert_close(
        contents["state_dict"]["standardize.mean"].numpy(), rows[~held_out][:, :2].mean(0), rtol=1e-12, atol=0
    )
    assert contents["training"]["columns"] == {"x": ["0", "1"], "context": []}
    assert "test_nats" in read_metrics(run / "metrics.csv")[0]
    fastflow.save(tmp_path / "own.pt", fastflow.load(run))
    np.savez(tmp_path / "images.npz", x=np.zeros((4, 8, 8), np.uint8))
    moved = {"config": {"data": str(tmp_path / "images.npz")}}
    fastflow.save(tmp_path / "moved.pt", fastflow.load(run), moved)
    assert main(["evaluate", str(run / "best.pt")]) == 0  # it has the names of its data and columns
    assert main(["sample", str(run / "best.pt"), "--n", "2", "--out", str(tmp_path / "s.csv")]) == 0
    assert data.load(str(tmp_path / "rows.npy")).columns.x == ("0", "1", "2")
    for argv, words in {
        (
            "sample",
            str(run),
            "--out",
            str(tmp_path / "s.png"),
        ): "s.png, expected a folder, or a file .csv, .npy",
        ("sample", str(run), "--context", str(tmp_path / "rows.npy")): "holds a model without context",
        ("sample", str(run), "--classes", "1"): "holds a model without classes",
        ("sample", str(run), "--temperature", "0.5", "1"): "expected one value for rows",
        ("sample", str(run), "--n", "0"): "n: got 0, expected at least 1",
        ("interpolate", str(run)): "expected a model of images",
        ("evaluate", str(tmp_path / "own.pt")): "does not contain the name of its training data",
        ("evaluate", str(tmp_path / "moved.pt")): "images.npz, expected a table",
        ("evaluate", str(run), "--columns", "0"): "columns: got 1 columns and 0 of context",
        ("evaluate", str(run), "--data", "photos"): "data: got 'photos', expected a table",
    }.items():
        capsys.readouterr()
        assert main(list(argv)) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            "--model glow",
            "model: got glow, expected vector_glow or maf or iaf or neural_spline_flow or residual_flow for rows such as those of moons",
        ),
        ("--n-bits 5", "n_bits: got 5, expected no value: vector_glow has no such option"),
        ("--image-size 8", "image_size: got 8, expected none for a table"),
        ("--class-conditional", "class_conditional: got True, expected False: vector_glow cannot be"),
        ("--horizontal-flip True", "horizontal_flip: got True, expected no value for rows"),
        ("--columns a", "columns: got 1 column, expected 2 or more, or columns of --context"),
        ("--data photos --columns a", "columns: got a, expected none for photos, which is no table"),
        ("--data photos --model vector_glow", "model: got vector_glow, expected glow or realnvp"),
    ],
)
def test_options_that_do_not_fit(argv, words, table, tmp_path, capsys):
    base = [] if "--data" in argv else ["--data", table]
    assert main(["train", *base, *argv.split(), "--out", str(tmp_path / "run")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
