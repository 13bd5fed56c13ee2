"""The front door of studies: profiles and places, values made once, tables of measurements, names that users import."""
import subprocess, sys
from pathlib import Path

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from hapnb import study
from hapnb.study import begin, machine, profile_settings

ROOT = Path(__file__).resolve().parents[1]


def start(store, **args): return begin("10_x", **{**dict(profile="smoke", dataset="toy", store=str(store)), **args})


def test_one_import_gives_a_study_its_names():
    names = ("begin compare_times equivalence Grid grid interval make_table "
             "paired_test published read_run run_grid run_study summarise time_pairs").split()
    assert set(names) <= set(study.__all__) and all(hasattr(study, n) for n in study.__all__)


def test_the_front_door_opens_without_networks_and_drawing():
    heavy = "timm, torchvision, matplotlib.pyplot, accelerate, optuna, papermill".split(", ")
    code = f"import sys, hapnb.study; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_profiles():
    assert profile_settings("full", full=dict(epochs=7))["epochs"] == 7
    assert profile_settings("quick", full=dict(epochs=7))["epochs"] != 7
    for name, special in (("ful", {}), ("full", {"ful": {}}), ("always", {})):
        with pytest.raises(ValueError, match="unknown profile"): profile_settings(name, **special)


def test_results_of_other_profiles_and_data_never_go_to_the_committed_figures(tmp_path):
    assert study.figures_dir("full") == ROOT / "figures"
    assert study.figures_dir("quick") == ROOT / "runs/figures/quick"
    assert study.figures_dir("full", "folder", tmp_path) == tmp_path / "figures/full-folder"


def test_begin_fills_in_what_the_parameters_leave_open(tmp_path):
    s = start(tmp_path, seeds=4)
    assert s.seeds == 4 and s.out.is_dir() and s.config(lr=0.5).lr == 0.5 and s.config().dataset == "toy"
    assert start(tmp_path).seeds == 2, "the profile's"
    with pytest.raises(ValueError, match="unknown field"): s.config(learning_rate=1)


@pytest.mark.parametrize("wrong, text", [(dict(profile="smok"), "'smoke'"), (dict(seeds=-1), "seeds must be"),
                                         (dict(seeds="many"), "seeds must be"), (dict(jobs=1.5), "jobs must be"),
                                         (dict(device="gpu"), "unknown device")])
def test_wrong_parameters_are_found_before_a_folder_is_made(tmp_path, wrong, text):
    with pytest.raises(ValueError, match=text): start(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_a_study_of_time_starts_no_server(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(study, "worker_context", begun.append)
    for alone in (True, False):
        start(tmp_path, alone=alone)
        assert len(begun) == (not alone)


# values that are made once

@pytest.fixture
def calls(): return []


def test_once_computes_a_value_again_for_other_inputs_and_other_code(tmp_path, monkeypatch, calls):
    s = start(tmp_path)
    assert s.once("v", lambda: calls.append("v") or {"a": 0.1}, 1) == s.once("v", None, 1) == {"a": 0.1}
    frame = lambda: calls.append("f") or pd.DataFrame({"x": [0.1, 0.2]}, index=[5, 7])
    pd.testing.assert_frame_equal(s.once("f", frame, ["k"]), s.once("f", None, ["k"]))
    s.once("f", frame, ["other"])
    monkeypatch.setattr(study, "code_hash", lambda: "new")
    s.once("f", frame, ["k"])
    assert calls == ["v", "f", "f", "f"]


def test_once_makes_a_damaged_value_again_and_forgets_when_forced(tmp_path, monkeypatch, calls):
    s, make = start(tmp_path), lambda: calls.append(1) or [1, 2]
    s.once("v", make)
    next((tmp_path / "derived").glob("*/value.json")).write_text("[1, 3]")
    with pytest.warns(RuntimeWarning, match="made again"): assert s.once("v", make) == [1, 2]
    monkeypatch.setenv("HAPNB_FORCE", "9e9")
    assert s.once("v", make) == [1, 2] and len(calls) == 3


def test_a_figure_is_drawn_once_and_its_files_come_back(tmp_path, calls):
    s, draw = start(tmp_path), lambda: calls.append("d") or plt.figure(figsize=(2, 1))
    first = s.figure_once("map", draw, ["k"]).data
    assert s.figure_once("map", None, ["k"]).data == first and (s.out / "map.svg").exists() and calls == ["d"]
    (s.out / "map.png").unlink()
    s.figure_once("map", None, ["k"])
    assert (s.out / "map.png").exists() and not plt.get_fignums()


# measurements

def test_measured_frames_are_saved_with_the_machine(tmp_path):
    s = start(tmp_path)
    frame = pd.DataFrame({"method": ["cube"], "ms": [123456.7], "ratio": [np.nan], "bytes": [1234567], "met": [False]})
    text = s.measured(frame, "times", "A caption.", ["A note."]).data
    assert text.startswith("A caption.\n\n| method |") and "| cube | 123,457 | - | 1,234,567 | no |" in text
    assert "| --- | ---: | ---: | ---: | --- |" in text and "A note.  \n" in text and machine() in text
    assert (s.out / "times.md").read_text() == text
    back = pd.read_csv(s.out / "times.csv")
    assert back["ms"][0] == 123457 and machine() in back["made_by"][0] and "profile smoke" in back["made_by"][0]
    assert all(w in machine() for w in ("cores", "threads", "torch 2."))
