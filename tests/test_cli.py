"""The command: exit statuses, a study that works, fails, is repeated; evaluate on files; doctor; runs by the command.

Wrong command lines have a table of their own in `test_cli_wrong.py`.
"""
import dataclasses, io, json, os, signal, subprocess, sys, time
from pathlib import Path

import layouts_fine, layouts_hier
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from hapnb import cli, commands, doctor, driver, runs, study
from hapnb.cli import main
from toy_study import run_here, STUDY, write_study

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ("--profile", "smoke", "--device", "cpu")
WORK = """
import json, os
from pathlib import Path
from hapnb.study import write_atomic
done = Path(store) / "count"
n = int(done.read_text()) if done.exists() else 0
write_atomic(done, str(n + 1))
print("profile", profile, "run", n)
"""
END = """
from hapnb.study import save_claims
save_claims([], out)
write_atomic(Path(out) / "main.md", "| the main table |")
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A project with two small studies, one of which fails where it is told to."
    root = tmp_path / "clone"
    write_study(root / "nbs/studies/10_works.ipynb", STUDY, [WORK, END])
    write_study(root / "nbs/studies/20_breaks.ipynb", STUDY, ["if seeds == 13: raise ValueError('thirteen')"])
    (root / "settings.ini").write_text("")
    monkeypatch.chdir(root)
    monkeypatch.delenv("HAPNB_FORCE", raising=False)
    return root


@pytest.fixture
def quick(monkeypatch):
    "Run the cells of studies in this process, for tests of what is kept: a kernel takes seconds to start."
    monkeypatch.setattr(driver, "_papermill", run_here)


@pytest.fixture
def call(capsys):
    "Call the command: (status, output, errors)."
    def run(*argv):
        status = main([str(a) for a in argv])
        return status, *capsys.readouterr()
    return run


def process(*argv, **kw):
    "The command as a process of its own."
    env = {**os.environ, "PYTHONPATH": str(ROOT), **kw.pop("env", {})}
    line = [sys.executable, "-m", "hapnb.cli", *map(str, argv)]
    return subprocess.run(line, env=env, capture_output=True, text=True, **kw)


# ---- reproduce and studies

def test_reproduce_prints_tables_and_places(clone, call):
    status, out, err = call("reproduce", "works", *SMOKE)
    assert (status, err) == (0, "")
    for text in ("[1/1] 10_works: A toy (about 0.1 min on 2 cores)", "profile smoke run 0", "| the main table |",
                 "runs/figures/smoke/10_works", "1 of 1 studies done"):
        assert text in out
    assert (clone / "runs/figures/smoke/claims.md").exists()
    assert (clone / "runs/notebooks/10_works-smoke.ipynb").exists()
    assert not (clone / "figures").exists(), "only the full profile writes to the committed figures"
    status, out, err = call("reproduce", "works", *SMOKE)
    assert (status, err) == (0, "") and "unchanged" in out and (clone / "runs/count").read_text() == "1"


def test_an_unchanged_study_is_left_alone(clone, quick, call):
    path = clone / "nbs/studies/10_works.ipynb"
    def again(profile="smoke", *more):
        status, out, err = call("reproduce", "works", "--profile", profile, "--device", "cpu", *more)
        assert (status, err) == (0, "") and "| the main table |" in out
        return "unchanged" not in out, int((clone / "runs/count").read_text())
    assert [again(), again()] == [(True, 1), (False, 1)]
    assert [again("quick"), again(), again("quick")] == [(True, 2), (False, 2), (False, 2)], "profiles are kept apart"
    assert again("smoke", "--force") == (True, 3)
    (clone / "runs/figures/smoke/10_works/main.md").write_text("edited")
    assert again() == (True, 4) and again("smoke", "--seeds", "4") == (True, 5)
    write_study(path, STUDY, [WORK, END + "# changed"])
    assert [again(), again()] == [(True, 6), (False, 6)]
    write_study(path, STUDY, [WORK, "1 / 0"])
    assert [call("reproduce", "works", *SMOKE)[0] for _ in range(2)] == [1, 1]
    assert (clone / "runs/count").read_text() == "8"


def test_a_study_edited_while_it_runs_is_run_again(clone, quick, call):
    path = clone / "nbs/studies/10_works.ipynb"
    edit = (f"import pathlib; p = pathlib.Path({str(path)!r})\n"
            "p.write_text(p.read_text().replace('toy', 'Toy', 1))")
    write_study(path, STUDY, [WORK, END, edit])
    for n in (1, 2):
        status, out, err = call("reproduce", "works", *SMOKE)
        assert (status, err) == (0, "") and (clone / "runs/count").read_text() == str(n)


def test_reproduce_full_goes_to_figures_and_a_failure_is_named(clone, call):
    status, out, err = call("reproduce", "--profile", "full", "--device", "cpu", "--seeds", "13")
    assert status == 1 and "code cell 3 (failed): ValueError: thirteen" in err
    assert str(clone / "runs/notebooks/20_breaks-full.ipynb") in err
    assert "about 1 min on 2 cores, less where runs are there already; a first look in 3 minutes" in out
    assert "1 of 2 studies done. Failed: 20_breaks." in out and (clone / "figures/10_works/main.md").exists()


def test_outside_a_clone_studies_say_where_they_are(monkeypatch, call):
    for module in (commands, driver, study): monkeypatch.setattr(module, "repo_root", lambda start=None: None)
    status, _, err = call("studies")
    assert status == 2 and "inside a clone" in err


def test_force_reaches_the_notebook(clone, monkeypatch, call):
    seen = []
    monkeypatch.setattr(commands, "run_study", lambda *a, **k: seen.append(os.environ.get("HAPNB_FORCE")) or a[0])
    monkeypatch.setenv("HAPNB_FORCE", "")
    call("reproduce", "works", "--force", "--device", "cpu")
    assert float(seen[0]) > 1e9


def test_studies_lists_state_and_cost(clone, call):
    (clone / "figures/10_works").mkdir(parents=True)
    (clone / "figures/10_works/main.md").write_text("")
    status, out, _ = call("studies")
    assert status == 0
    for text in ("minutes on 2 cores: smoke 0.1, quick 2", "full in figures/10_works/", "nothing yet"):
        assert text in out


def test_a_study_on_demand_is_listed_and_runs_only_when_named(clone, quick, call):
    path = clone / "nbs/studies/20_breaks.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][0]["source"] = ["# Slow\n", "On demand: it measures the machine."]
    path.write_text(json.dumps(nb))
    assert "on demand: hapnb reproduce 20_breaks" in call("studies")[1]
    status, out, _ = call("reproduce", *SMOKE, "--seeds", "13")
    assert status == 0 and "[1/1] 10_works" in out and "20_breaks" not in out
    status, out, _ = call("reproduce", "20_breaks", *SMOKE)
    assert status == 0 and "[1/1] 20_breaks" in out


# ---- the command itself

@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_explains_and_has_examples(call, command):
    status, out, _ = call(*command.split(), "--help")
    assert status == 0 and "usage: hapnb" in out and ("example" in out or not command)
    assert "minutes on two cores" in " ".join(out.split()) or command != "reproduce"


def test_help_describes_every_setting_of_a_run(call):
    out = " ".join(call("train", "--help")[1].split())
    # the comment of a field is its help; one without would raise
    for text in ("images in a batch", "names: m, level", "learning rate at the start"): assert text in out
    status, out, _ = call("train", "--dataset", "toy", "--loss", "SupAPLoss", "--settings")
    assert status == 0
    for text in ("--loss-args of SupAPLoss\n  tau ", "at least 1; images of each class in a batch"): assert text in out


def test_help_loads_nothing_heavy():
    code = ("import sys; from hapnb import cli; cli.main(['--help']); cli.main(['--version'])\n"
            "print({'torch', 'numpy', 'pandas', 'pyarrow', 'pydantic', 'matplotlib'} & set(sys.modules))")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    p = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert p.stdout.endswith("set()\n"), p.stdout + p.stderr


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "Finished runs are kept"),
    (KeyError("x"), 1, "bug in hapnb"),
    (MemoryError("Unable to allocate 7 EiB"), 1, "Give smaller sizes"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "Give smaller sizes"),
    (BrokenPipeError(32, "Broken pipe"), 141, ""),
    (OSError(28, "No space left on device"), 1, "No space left"),
    (FileNotFoundError(2, "No such file or directory", "a.csv"), 2, "a.csv"),
    (ImportError("x is missing: pip install x"), 1, "hapnb: x is missing: pip install x\n"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), 1, "--workers 2, or 0"),
    (OSError("Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
             "OSError: cannot read image 3 of sop/fit, a/b: c.JPG: broken."), 1,
     "hapnb: cannot read image 3 of sop/fit, a/b: c.JPG: broken.\n")])
def test_an_error_becomes_a_status_and_words(clone, call, monkeypatch, error, status, words):
    def fail(*a, **k): raise error
    monkeypatch.setattr(commands, "run_study", fail)
    found, _, err = call("reproduce", "works", "--device", "cpu")
    assert found == status and words in err, err
    assert ("Traceback" in err) == ("bug in hapnb" in err) == (type(error) is KeyError)


def test_a_full_device_gets_a_way_out(clone, call, monkeypatch):
    class OutOfMemoryError(RuntimeError): "As torch's."
    def fail(*a, **k): raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    monkeypatch.setattr(commands, "run_study", fail)
    status, _, err = call("reproduce", "works", "--device", "cpu")
    assert status == 1 and "--micro-batch 32" in err and "CUDA out of memory. Tried" in err


def test_a_value_error_of_another_library_says_where_it_came_from(call, monkeypatch, tmp_path):
    np.savez(tmp_path / "e.npz", embeddings=np.ones((2, 2)), labels=[0, 0])
    def parse(*a, **k): json.loads("{")
    monkeypatch.setattr("hapnb.core.as_relevance", parse)
    status, _, err = call("evaluate", tmp_path / "e.npz")
    assert status == 1 and "json.decoder" in err and "HAPNB_TRACEBACK=1" in err and "bug" not in err
    monkeypatch.setenv("HAPNB_TRACEBACK", "1")
    assert "Traceback" in call("evaluate", tmp_path / "e.npz")[2]


def test_as_a_process(clone):
    p = process("reproduce", "nothing", cwd=clone)
    assert p.returncode == 2 and p.stderr.startswith("hapnb: unknown study 'nothing'")
    p = process(b"\xff".decode(errors="surrogateescape"), cwd=clone)
    assert p.returncode == 2 and p.stderr.startswith("hapnb: unknown command")


def test_a_pipe_without_unicode_does_not_stop_the_work(clone, quick, monkeypatch):
    cell = "from hapnb.study import write_atomic; write_atomic(out + '/main.md', '1 ± 2 †')"
    write_study(clone / "nbs/studies/10_works.ipynb", STUDY, [cell])
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, "ascii"))
    assert main(["reproduce", "works", *SMOKE]) == 0
    sys.stdout.flush()
    assert b"1 ? 2 ?" in pipe.getvalue()


@pytest.mark.parametrize("line, allowed", [
    ("train --list | head -n 1", (141,)), ("--help | true", (0, 141)), ("nothing 2>&1 | true", (2,))])
def test_a_pipe_that_is_closed_early_is_no_failure(tmp_path, line, allowed):
    script = f"{sys.executable} -m hapnb.cli {line} > /dev/null; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    p = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert int(p.stdout) in allowed and p.stderr == ""


@pytest.mark.parametrize("kind, studies", [(signal.SIGKILL, ["long"]), (signal.SIGINT, ["long", "longer"])])
def test_a_killed_command_leaves_no_process(clone, tmp_path, kind, studies):
    cell = ("import os, time, pathlib\n"
            "pathlib.Path(store, f'kernel{os.getpid()}').touch()\n"
            "time.sleep(60)")
    for i, name in enumerate(studies): write_study(clone / f"nbs/studies/3{i}_{name}.ipynb", STUDY, [cell])
    argv = [sys.executable, "-m", "hapnb.cli", "reproduce", *studies, "--device", "cpu", "--store", str(tmp_path)]
    # a test process of xdist ignores SIGINT, and its children would inherit that
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    p = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=clone, stdout=subprocess.DEVNULL,
                         preexec_fn=heard)
    # a busy machine takes its time
    for _ in range(1800):
        kernels = [int(k.name.removeprefix("kernel")) for k in tmp_path.glob("kernel*")]
        if len(kernels) == len(studies): break
        time.sleep(0.1)
    family = psutil.Process(p.pid).children(recursive=True)
    assert set(kernels) <= {c.pid for c in family} and len(kernels) == len(studies)
    p.send_signal(kind)
    p.wait(60)
    assert not psutil.wait_procs(family, timeout=20)[1]


# ---- train and evaluate

def test_train_and_evaluate_a_run(tmp_path, call):
    store = tmp_path / "runs"
    argv = ["--dataset", "toy", "--image-size", 32, "--epochs", 1, "--batch_size", 24, "--embed-dim", 8, "--ks", "1,3",
            "--loss", "SupAPLoss", "--loss-args", '{"tau": 0.02}', "--device", "cpu", "--store", store]
    status, out, _ = call("train", *argv)
    assert status == 0 and "level 0" in out and "R@3" in out and "run: " in out
    run = next(p for p in store.iterdir() if (p / "metrics.json").exists())
    assert json.loads((run / "config.json").read_text())["loss_args"] == {"tau": 0.02}
    metrics = json.loads((run / "metrics.json").read_text())
    for name in (run.name[:6], run):
        status, out, _ = call("evaluate", "--run", name, "--store", store, "--json")
        assert status == 0 and json.loads(out) == metrics
    more = ["--ks", "2", "--relevance", '{"kind": "pop", "alpha": 2}']
    status, out, _ = call("evaluate", "--run", run.name[:6], "--store", store, "--json", *more)
    other = json.loads(out)
    assert other["H-AP"] != metrics["H-AP"] and abs(other["AP_level0"] - metrics["AP_level0"]) < 1e-12
    assert "R@2_level1" in other


def test_evaluate_reads_the_same_from_each_kind_of_file(tmp_path, call):
    z = torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(0))).numpy()
    fine = np.arange(20) // 4
    labels = np.stack([fine, fine // 2], 1)
    words = pd.DataFrame(dict(kind=[f"k{f}" for f in fine], family=[f"f{f}" for f in fine // 2]))
    np.savez(tmp_path / "a.npz", embeddings=z, labels=labels)
    from safetensors.numpy import save_file
    save_file({"embeddings": z}, tmp_path / "b.safetensors")
    words.to_csv(tmp_path / "l.csv", index=False)
    words.assign(embedding=list(z)).to_parquet(tmp_path / "c.parquet")
    lines = (["a.npz"], ["b.safetensors", "--labels", tmp_path / "l.csv"], ["c.parquet"])
    found = [call("evaluate", tmp_path / name, *more, "--json", "--device", "cpu") for name, *more in lines]
    assert all(f[0] == 0 for f in found) and len({f[1] for f in found}) == 1
    from hapnb.metrics import evaluate
    assert json.loads(found[0][1]) == pytest.approx(evaluate(torch.tensor(z), torch.tensor(labels)))
    one = call("evaluate", tmp_path / "c.parquet", "--levels", "family", "--json", "--device", "cpu")
    assert one[0] == 0 and json.loads(one[1])["AP_level0"] == json.loads(found[0][1])["AP_level1"]


# ---- doctor

def test_doctor_lists_what_is_here_and_what_is_missing(call, monkeypatch):
    status, out, _ = call("doctor")
    assert status == 0 and "checksum right" in out and "torch 2." in out and "GB free" in out
    assert "ok  faiss-" in out and "searches on" in out
    monkeypatch.setattr(doctor, "_version", lambda name: "not installed")
    assert "ok  faiss 1." in call("doctor")[1]
    monkeypatch.setitem(sys.modules, "faiss", None)
    status, out, _ = call("doctor")
    assert status == 1 and "!!  timm  (pip install timm)" in out and "!!  faiss  (pip install faiss-" in out
    monkeypatch.setattr(doctor, "_version", lambda name: "1.15.1")
    assert "!!  faiss-gpu 1.15.1  (installed but does not load" in call("doctor")[1]


def test_doctor_sees_a_damaged_file(monkeypatch, call):
    real = Path.read_text
    fake = lambda self, *a, **k: "0" * 64 if self.name == "emoji.sha256" else real(self, *a, **k)
    monkeypatch.setattr(Path, "read_text", fake)
    assert "checksum wrong" in call("doctor")[1]


def test_doctor_shows_the_page_of_a_dataset(call):
    status, out, _ = call("doctor", "--dataset", "sop")
    assert status == 0
    for text in ("Stanford Online Products", "59,551 images, classes 11,318 / 12", "Ebay_train.txt", "Size: ",
                 "Terms: ",
                 "hapnb doctor --dataset sop --data-dir DIR"):
        assert text in out


def test_doctor_says_what_is_missing(call, tmp_path):
    status, out, _ = call("doctor", "--dataset", "cub", "--data-dir", tmp_path)
    assert status == 1 and "!!  looked for CUB-200-2011" in out and "images.txt" in out and "https://" in out
    root = layouts_fine.make_cub(tmp_path)
    status, out, _ = call("doctor", "--dataset", "cub", "--data-dir", tmp_path)
    assert status == 1 and "5,864" in out.split("!!", 1)[1], "a part of the images is not the dataset"
    (root / "classes.txt").unlink()
    status, out, _ = call("doctor", "--dataset", "cub", "--data-dir", root)
    assert status == 1 and "classes.txt is missing" in out


TRAIN, TEST = [c for c in layouts_fine.CUB if c <= 100], [c for c in layouts_fine.CUB if c > 100]


def test_doctor_of_a_complete_dataset(call, tmp_path, monkeypatch):
    from hapnb.benchmarks import SOURCES, source_of
    layouts_fine.make_cub(tmp_path)
    small = {part: dict(images=len(c) * 3, classes=(len(c),)) for part, c in (("train", TRAIN), ("test", TEST))}
    monkeypatch.setitem(SOURCES, "cub", dataclasses.replace(source_of("cub"), counts=small))
    status, out, _ = call("doctor", "--dataset", "cub", "--data-dir", tmp_path)
    assert status == 0 and "!!" not in out and "cub is complete" in out
    assert f"ok  train: {3 * len(TRAIN)} images" in out and f"ok  test: {3 * len(TEST)} images" in out


def test_doctor_hands_arguments_to_the_loader(call, tmp_path):
    layouts_hier.make_vehicleid(tmp_path)
    def look(args): return call("doctor", "--dataset", "vehicleid", "--data-dir", tmp_path, "--dataset-args", args)
    status, out, _ = look('{"size": "large", "counts": false}')
    assert status == 0 and "ok  test: 28 images; classes: vehicle 8" in out
    for args, said in (('{"siez": "large"}', "Did you mean 'size'?"), ('{"size": "larg"}', "Did you mean 'large'?"),
                       ("{}", "expected 113,346")):
        status, out, _ = look(args)
        assert status == 1 and said in out


def test_doctor_of_other_data(call, tmp_path):
    status, out, _ = call("doctor", "--dataset", "toy")
    assert status == 0 and "ok  train: 144 images" in out
    for argv, text in ((["folder"], "data_dir is missing"), (["folder", "--data-dir", tmp_path], str(tmp_path))):
        status, out, err = call("doctor", "--dataset", *argv)
        assert status == 1 and text in out and not err


# ---- recipes and plans

def test_all_recipes_are_listed(call):
    from hapnb.recipes import RECIPES
    status, out, _ = call("train", "--list")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == list(RECIPES)
    status, out, _ = call("train", "--list", "--recipe", "smoothap/")
    assert status == 0 and all(line.startswith("smoothap/") for line in out.splitlines()) and "vehicleid" in out


def test_a_dry_run_with_and_without_images(call, tmp_path):
    argv = ["train", "--recipe", "hist/cub-resnet50", "--dry-run", "--trunk", "toy", "--image-size", 32,
            "--embed-dim", 16, "--device", "cpu", "--ks", "1,2"]
    status, out, _ = call(*argv)
    assert status == 0
    for text in ("published counts are used", "5,864 images of 100 classes", "183 steps per epoch, 7,503 in all",
                 "optimiser: ", "time of the run on cpu", "left out: "):
        assert text in out
    layouts_fine.make_cub(tmp_path, 8)
    status, out, _ = call(*argv, "--data-dir", tmp_path, "--dataset-args", '{"counts": false}')
    n = 8 * len(TRAIN)
    assert status == 0 and f"data cub (counted): {n} images of {len(TRAIN)} classes" in out
    assert f"{n // 32} steps per epoch, {41 * (n // 32)} in all" in out and "each in one process" in out
    status, out, _ = call(*argv, "--data-dir", tmp_path)
    assert status == 0 and "cannot be loaded" in out and "5,864" in out


def test_train_on_a_part_of_a_dataset(call, tmp_path, monkeypatch):
    "What the options say of the data counts when it is looked for, too."
    layouts_fine.make_sop(tmp_path, 4)
    argv = ["train", "--recipe", "happier/sop", "--data-dir", tmp_path, "--store", tmp_path / "runs", "--device", "cpu",
            "--batch-size", 16, "--sampler-args", '{"batches_per_pair": 1}', "--image-size", 32, "--epochs", 2,
            "--warmup-epochs", 1, "--precision", "no"]
    status, _, err = call(*argv)
    assert status == 2 and "expected 59,551" in err and """--dataset-args '{"counts": false}'""" in err
    argv += ["--dataset-args", '{"counts": false}']
    def no_network(*a, **k): raise OSError("no route to host")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    status, _, err = call(*argv)
    assert status == 1 and "could not be downloaded" in err and "pretrained=False" in err
    assert "Traceback" not in err and "bug" not in err
    argv += ["--trunk", "toy", "--pretrained", "false"]
    status, out, err = call(*argv)
    assert status == 0 and "H-AP" in out and len(list((tmp_path / "runs").glob("*/metrics.json"))) == 1
    fast = ["--lr", 1e12, "--warmup-epochs", 0, "--groups", '{"loss": {"lr": 1e30}}', "--optimizer", "sgd"]
    status, _, err = call(*argv, *fast)
    assert status == 1 and "Try a smaller learning rate" in err and "Traceback" not in err
    next(tmp_path.glob("*/chair_final/*.JPG")).unlink()
    status, _, err = call(*argv)
    assert status == 2 and "1 of 36 images of sop are missing" in err and "chair_final" in err


# ---- features, clusters, open world

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Embeddings of the toy dataset by its trunk, two splits."
    folder = tmp_path_factory.mktemp("features") / "new"
    for split in ("train", "test"):
        assert main(["features", "--trunk", "toy", "--image-size", "32", "--dataset", "toy", "--split", split,
                     "--out", str(folder / f"{split}.parquet"), "--device", "cpu"]) == 0
    return folder


def test_features_of_a_run_are_its_own_and_can_be_evaluated(clone, call):
    from hapnb.features import read_features
    argv = ["--device", "cpu", "--store", "store"]
    toy = ["--dataset", "toy", "--trunk", "toy", "--image-size", "32", "--embed-dim", "8", "--batch-size", "48"]
    assert call("train", *toy, "--epochs", "1", "--loss", "SupAPLoss", *argv)[0] == 0
    key = next(p.parent.name for p in (clone / "store").glob("*/metrics.json"))
    run = runs.Result(f"store/{key}")
    for name in (key[:6], f"store/{key}"):
        status, out, err = call("features", "--run", name, "--out", "f.parquet", *argv)
        assert (status, err) == (0, "") and f"run {key}, toy/test" in out and "f.parquet: 0.0 MB" in out
    assert torch.equal(read_features("f.parquet").embeddings, run.embeddings())
    found = json.loads(call("evaluate", "f.parquet", "--json", "--device", "cpu")[1])
    assert found == pytest.approx({k: v for k, v in run.metrics.items() if k in found})
    own = ["--split", "train", "--levels", "shape", "--out", "t.parquet"]
    assert call("features", "--run", key, *own, *argv)[0] == 0
    assert read_features("t.parquet").level_names == ("shape",)
    Image = pytest.importorskip("PIL.Image")
    (clone / "photos/a").mkdir(parents=True)
    for i in range(3): Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(clone / f"photos/a/{i}.png")
    other = ["--dataset", "folder", "--data-dir", "photos", "--split", "all", "--out", "p.parquet"]
    assert call("features", "--run", key, *other, *argv)[0] == 0
    assert len(read_features("p.parquet")) == 3


@pytest.mark.parametrize("argv", [
    [], ["--method", "kmeans", "--clusters", "18"], ["--method", "agglomerative", "--args", '{"threshold": 0.1}'],
    ["--args", '{"min_cluster_size": 3}', "--level", "shape"]])
def test_cluster_prints_and_writes(files, tmp_path, call, argv):
    from hapnb.clustering import clustering_scores
    from hapnb.features import read_features
    for name in ("out/c.parquet", "out/c.csv"):
        status, out, err = call("cluster", files / "test.parquet", *argv, "--out", tmp_path / name, "--device", "cpu")
        assert (status, err) == (0, "") and ("method hdbscan: it needs no labels" in out) == ("--method" not in argv)
        assert "144 points" in out
        assert ("against shape (3 classes" if "shape" in argv else "against hue (18 classes") in out
    a, b = pd.read_parquet(tmp_path / "out/c.parquet"), pd.read_csv(tmp_path / "out/c.csv")
    table = read_features(files / "test.parquet")
    assert a.equals(b) and a.path.tolist() == table.paths and list(a) == ["path", "cluster"]
    s = clustering_scores(table.labels[:, 1 if "shape" in argv else 0], a.cluster)
    assert f"{100 * s['bcubed_F']:.2f}" in out and f"{s['clusters']:,} clusters, noise {s['noise']}" in out


@pytest.mark.parametrize("method, name", [
    ("kmeans", "points_per_cluster"), ("hdbscan", "min_cluster_size"), ("agglomerative", "threshold")])
def test_cluster_chooses_a_constant_on_labelled_features(files, call, method, name):
    train = ["--train", files / "train.parquet", "--method", method, "--device", "cpu"]
    status, out, err = call("cluster", files / "test.parquet", *train)
    assert (status, err) == (0, "") and f'train.parquet: {{"{name}": ' in out and "(pairwise F " in out


def test_cluster_without_labels_one_point_and_copies(tmp_path, call):
    from hapnb.features import FeatureTable, write_features
    path = tmp_path / "f.parquet"
    for x, text in ((torch.ones(1, 3), "1 points, 1 clusters"), (torch.ones(30, 3), "30 points, "),
                    (torch.eye(3), "all points are noise: try a smaller min_cluster_size")):
        write_features(FeatureTable(x), path)
        status, out, err = call("cluster", path, "--device", "cpu")
        assert (status, err) == (0, "") and text in out and "no labels: no scores" in out
    out = call("cluster", path, "--method", "agglomerative", "--device", "cpu")[1]
    assert "no two points were put together: try a larger threshold" in out


def test_cluster_with_hilander(files, tmp_path, call):
    pytest.importorskip("hapnb.hilander")
    from hapnb.features import FeatureTable, write_features
    test, train, model = files / "test.parquet", files / "train.parquet", tmp_path / "lander"
    decode = ["--k", "6", "--tau", "0.5", "--device", "cpu"]
    learn = ["--train", train, "--save-model", model, "--epochs", "8"]
    status, out, _ = call("cluster", test, *learn, *decode, "--out", tmp_path / "a.parquet")
    assert status == 0 and f"model: {model}" in out and 'hilander {"k": 6, "tau": 0.5}' in out and "against hue" in out
    assert call("cluster", test, "--model", model, *decode, "--out", tmp_path / "b.parquet")[0] == 0
    a, b = (pd.read_parquet(tmp_path / f"{n}.parquet") for n in "ab")
    assert a.equals(b) and list(a) == ["path", "cluster", "density"]
    for x, about, text in ((torch.randn(40, 5), {}, "32 dimensions and"),
                           (torch.randn(40, 32), dict(run="abc"), "do not live in one space")):
        other = write_features(FeatureTable(x, about=about), tmp_path / "o.parquet")
        status, _, err = call("cluster", other, "--model", model, "--device", "cpu")
        assert status == 2 and text in err and "Traceback" not in err
    for note in ("[1", "[]", "{}", '{"dimensions": "x", "about": {}}'):
        (model / "features.json").write_text(note)
        status, _, err = call("cluster", test, "--model", model, "--device", "cpu")
        assert status == 2 and "features.json is damaged" in err and "Traceback" not in err, err


TOY = ["--dataset", "toy", "--rounds", "2", "--device", "cpu", "--store", "store", *(w for s in (
    "base.trunk=toy", "base.image_size=32", "base.embed_dim=8", "base.batch_size=24", "base.epochs=1",
    "base.loss=SmoothAPLoss", "base.dataset_args.hues=24", "hilander.epochs=2", "decode.k=4", "decode.tau=0.5",
    'select={"mode": "all"}', 'split={"known": 0.5}') for w in ("--set", s))]


def test_openworld_prints_one_row_per_round(clone, call):
    openworld = pytest.importorskip("hapnb.openworld")
    status, out, _ = call("openworld", "--dry-run", *TOY)
    assert status == 0 and not list((clone / "store").iterdir())
    for text in ('  rounds = 2\n', '"epochs": 1', "labelled; pool of", "nothing was trained"): assert text in out
    status, out, err = call("openworld", *TOY)
    assert status == 0, err
    result = openworld.OpenWorldResult(next((clone / "store").glob("*/round_0")).parent)
    rows = [line.split() for line in out.splitlines() if line[:2] in ("0 ", "1 ")]
    assert len(rows) == 2 and rows[1][1] == f"{100 * result.rounds['R@1_level0'][1]:.2f}"
    assert f"run: store/{result.key}" in out and (result.path / "round_0/selection.parquet").exists()
    assert f"selection of round 0: store/{result.key}/round_0/selection.parquet" in out
    again = call("openworld", *TOY)[1].splitlines()
    assert again[-len(rows):] == out.splitlines()[-len(rows):], "a finished run is read back"
    last, run = result.training(-1), ("--run", result.key[:6], "--store", "store", "--device", "cpu")
    status, out, err = call("features", *run, "--out", "f.parquet")
    assert status == 0 and f"its last training is {last.key}" in err and f"run {last.key}" in out
    status, out, err = call("evaluate", *run, "--json")
    assert status == 0 and json.loads(out) == last.metrics


# ---- packages, folders, protocols

def test_without_an_optional_package(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    # a name on the Hub is no folder
    hub = ["--dataset", "huggingface", "--data-dir", "somebody/birds"]
    status, _, err = call("train", *hub, "--dataset-args", '{"levels": ["label"]}')
    assert status == 2 and "pip install datasets" in err and "bug" not in err
    status, out, _ = call("doctor", *hub)
    assert status == 1 and "!!" in out
    for m in list(sys.modules):
        if m.startswith("pytorch_metric_learning"): monkeypatch.setitem(sys.modules, m, None)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    status, _, err = call("train", "--dataset", "toy", "--loss", "pml/TripletMarginLoss")
    assert status in (1, 2) and "pip install pytorch-metric-learning" in err and "bug" not in err


def test_workers_and_a_folder_from_here(call, tmp_path, monkeypatch):
    "The run keeps where its data is, whatever folder is the current one later; --workers reaches it."
    layouts_fine.make_sop(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--dataset", "sop", "--data-dir", "Stanford_Online_Products", "--dataset-args",
            '{"counts": false}', "--trunk", "toy", "--image-size", 32, "--batch-size", 8, "--epochs", 1,
            "--freeze", "none", "--device", "cpu", "--store", tmp_path / "runs", "--ks", "1"]
    seen, real = [], runs.run
    monkeypatch.setattr(runs, "run", lambda *a, **k: seen.append(k["workers"]) or real(*a, **k))
    status, out, err = call(*argv, "--workers", 0)
    assert status == 0 and seen == [0], err
    [run] = [p.parent for p in (tmp_path / "runs").glob("*/metrics.json")]
    kept = json.loads((run / "config.json").read_text())
    assert kept["data_dir"] == str(tmp_path / "Stanford_Online_Products") and f"run: runs/{run.name}" in out
    monkeypatch.chdir("/")
    out = ["--out", tmp_path / "f.parquet", "--device", "cpu"]
    assert call("features", "--run", run.name, "--store", tmp_path / "runs", *out)[0] == 0


def test_a_run_is_evaluated_by_its_own_protocol(call, tmp_path):
    "In-shop: queries search the gallery, also where other numbers are asked for."
    from hapnb.metrics import evaluate
    layouts_fine.make_inshop(tmp_path)
    store = ["--store", tmp_path / "runs", "--device", "cpu"]
    argv = ["train", "--dataset", "inshop", "--data-dir", tmp_path, "--dataset-args", '{"counts": false}',
            "--trunk", "toy", "--image-size", 32, "--batch-size", 4, "--sampler-args", '{"m": 2}', "--epochs", 1,
            "--freeze", "none", "--workers", 0, "--ks", "1,2", *store]
    status, out, err = call(*argv)
    assert status == 0, err
    run = next(p.parent for p in (tmp_path / "runs").glob("*/metrics.json"))
    def shown(*more): return call("evaluate", "--run", run.name, "--json", *store, *more)
    kept = json.loads((run / "metrics.json").read_text())
    status, out, err = shown("--ks", "1,2")
    assert status == 0 and json.loads(out) == pytest.approx(kept), err
    wrong = evaluate(runs.Result(run).embeddings(), runs.Result(run).labels(), ks=(1, 2))
    assert json.loads(out)["AP_level0"] != pytest.approx(wrong["AP_level0"]), "leave-one-out is another question"
    (tmp_path / "inshop").rename(tmp_path / "elsewhere")
    status, _, err = shown("--ks", "1,2")
    assert status == 2 and "which images are queries and which are gallery" in err and "list_eval_partition.txt" in err
    assert json.loads(shown()[1]) == kept, "what was measured then needs no data"


@pytest.mark.parametrize("dataset, recipe, argv, shown", [
    ("vehicleid", "smoothap/vehicleid",
     ["--batch-size", 8, "--sampler-args", '{"m": 2}', "--protocol", '{"kind": "random-gallery"}', "--ks", "1,2"],
     ["R@1 std", "R@2"]),
    ("dyml-vehicle", "happier/dyml-vehicle", ["--batch-size", 16], ["mAP", "R@20", "ASI"]),
    ("gldv2", "suprank/gldv2", ["--batch-size", 8, "--init", "default"], ["mAP@100", "mAP@100_private"]),
    ("inat-full", "happier/inat-full", ["--batch-size", 12, "--warmup-epochs", 0], ["H-AP", "level 6"])])
def test_each_protocol_from_training_to_evaluation(call, tmp_path, dataset, recipe, argv, shown):
    "A run of each kind of benchmark is printed, and its metrics can be computed again."
    from test_hierarchies import MAKE
    MAKE[dataset](tmp_path / "data")
    store = ["--store", tmp_path / "runs", "--device", "cpu"]
    status, out, err = call("train", "--recipe", recipe, "--data-dir", tmp_path / "data", "--image-size", 32,
                            "--epochs", 1, "--precision", "no", "--trunk", "toy", "--pretrained", "false",
                            "--workers", 0, "--dataset-args", '{"counts": false}', *argv, *store)
    assert status == 0 and all(t in out for t in shown), err
    [run] = [p.parent for p in (tmp_path / "runs").glob("*/metrics.json")]
    asked, kept = (json.loads((run / name).read_text()) for name in ("config.json", "metrics.json"))
    ks = ",".join(map(str, asked["ks"]))
    status, out, err = call("evaluate", "--run", run.name, "--json", "--ks", ks, *store)
    again = json.loads(out)
    assert status == 0 and {k: again[k] for k in kept} == pytest.approx(kept), err
