"""Comparing models: their notation, the report, and a comparison through the command line."""

import base64
import html.parser
import io
import json
import os
import re
import signal
import statistics
import sys

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from configs import compare_digits, compare_placement, compare_sharing
from helpers import few_digits, run_program, shallow
from regnet_flax import create_model
from regnet_flax.analysis import compare, report
from regnet_flax.config.check import model_options
from regnet_flax.errors import ConfigError, NonFiniteError
from regnet_flax.models.registry import parse_variant
from regnet_flax.modes import compare as mode
from regnet_flax.training.trainer import Trainer
from regnet_flax.training.workdir import plain


def test_variants_as_they_are_written():
    assert parse_variant("resnet20") == ("resnet20", {})
    text = " regnet20_convlstm  kernel=dense regulated_stages = (1, 2)  share_regulator=False width=8"
    options = {"kernel": "dense", "regulated_stages": (1, 2), "share_regulator": False, "width": 8}
    assert parse_variant(text) == ("regnet20_convlstm", options)
    assert mode.label(text) == "regnet20_convlstm kernel=dense regulated_stages=(1,2) share_regulator=False width=8"
    assert parse_variant("a regulated_stages=[1]") == ("a", {"regulated_stages": (1,)})
    assert parse_variant("a bottleneck_stride=3x3") == ("a", {"bottleneck_stride": "3x3"})


def test_every_model_of_a_config_has_a_folder_of_its_own_and_is_what_it_says():
    config = compare_placement.get_config()
    folders = [mode.folder(variant) for variant in config.compare.models]
    assert folders[0] == "regnet20_convlstm-regulated_stages-none"
    assert folders[-1] == "regnet20_convlstm-regulated_stages-1-2-3" and len(set(folders)) == 7
    assert all(re.fullmatch(r"[\w-]+", folder) for folder in folders)
    made = [mode.variant_config(config, variant) for variant in config.compare.models]
    assert [c.model.overrides.regulated_stages for c in made] == list(compare_placement.STAGES)
    assert config.model.overrides.regulated_stages is None, "the config given is as it was"
    models = [create_model(c.model.name, **model_options(c)) for c in made]
    assert [m.regulated_stages for m in models] == list(compare_placement.STAGES)


def test_a_variants_own_options_go_before_the_configs():
    config = compare_sharing.get_config()
    config.model.overrides.kernel = "dense"
    assert mode.variant_config(config, "regnet20_convgru").model.overrides.kernel == "dense"
    assert mode.variant_config(config, "regnet20_convgru kernel=separable").model.overrides.kernel == "separable"


# Statistics


@pytest.mark.parametrize("n, m", [(3, 3), (5, 2), (2, 4)])
def test_the_interval_is_that_of_welchs_t(n, m):
    rng = np.random.default_rng(n)
    values, baseline = rng.normal(5, 2, n), rng.normal(7, 0.5, m)
    expected = scipy.stats.ttest_ind(values, baseline, equal_var=False).confidence_interval(0.95)
    between, margin = compare.difference(values, baseline)
    assert between == pytest.approx(statistics.fmean(values) - statistics.fmean(baseline))
    assert (between - margin, between + margin) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert compare.deviation(values) == pytest.approx(statistics.stdev(values))


def test_the_interval_by_hand():
    # Variances 1 and 4 of n = 3: a standard error of √(5/3), 25/(1/2 + 16/2) = 2.941 degrees of freedom, t = 3.2185.
    between, margin = compare.difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert between == -2 and margin == pytest.approx(3.2185 * (5 / 3) ** 0.5, rel=1e-3)


def test_what_cannot_have_an_interval():
    assert compare.difference([2.0], [3.0]) == (-1, None)
    assert compare.difference([2.0, 2.0], [3.0, 3.0]) == (-1, 0)
    assert compare.deviation([2.0]) is None


def test_published_errors():
    assert compare.claim("regnet20_convgru", "cifar10") == "7.42 % (Xu et al.)"
    assert compare.claim("se_regnet20_convlstm", "cifar100") == "29.02 % (Xu et al.)"
    assert compare.claim("resnet20", "cifar10") == "8.38 % (Xu et al.), 8.75 % (He et al.)"
    assert compare.claim("resnet56", "cifar10").startswith("6.97 %")
    for model, dataset in [("resnet20", "digits"), ("regnet56_convgru", "cifar10"), ("se_resnet56", "cifar10")]:
        assert compare.claim(model, dataset) == ""


# The report, for workdirs written by hand

ACCURACY = {
    "resnet8": [0.90, 0.92, 0.91],
    "regnet8_convlstm kernel=dense": [0.95, 0.955, 0.97],
    "regnet8_convgru regulated_stages=()": [0.89, 0.93, 0.92],
}


def write_run(workdir, variant, accuracies, seeds, classes=10):
    config = compare_digits.get_config()
    config.model.overrides.width = None
    config = mode.variant_config(config, variant)
    config.dataset.num_classes, config.seed = classes, seeds[0]
    several = len(seeds) > 1
    record = {"image_shape": [8, 8, 1]} | ({"seeds": list(seeds)} if several else {})
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(plain(config) | record))
    lines = []
    for epoch in (1.0, 2.0):
        own = {}
        for seed, accuracy in zip(seeds, accuracies, strict=True):
            value = accuracy if epoch == 2 else accuracy / 2
            own[str(seed)] = {"train_loss": 1 - value, "eval_accuracy": value, "eval_top5_accuracy": (1 + value) / 2}
        means = {name: statistics.fmean(o[name] for o in own.values()) for name in own[str(seeds[0])]}
        lines.append({"step": int(44 * epoch), "epoch": epoch, **means} | ({"seeds": own} if several else {}))
    lines.insert(0, {"step": 1, "epoch": 0.02, "learning_rate": 0.1})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if classes <= 5:
        for line in lines:
            for values in (line, *line.get("seeds", {}).values()):
                values.pop("eval_top5_accuracy", None)
    last = {"last": {k: v for k, v in lines[-1].items() if k != "seeds"}}
    results = last | {"parameters": 1234, "wall_time_seconds": 3725.0, "seed": seeds[0]}
    results["finished"] = f"2026-02-{round(100 * accuracies[0]) - 80:02}T23:59:59+00:00"
    results |= {
        "hardware": {"platform": "gpu", "device": "T<4>", "devices": 2, "processes": 1, "cpu_cores": 16},
        "versions": {"jax": "1.2"},
        "command": "python -m a --b='<c>'",
    }
    if several:
        results["seeds"] = {seed: {"last": {"step": 88, "epoch": 2.0} | values} for seed, values in own.items()}
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


class Page(html.parser.HTMLParser):
    """Collects the cells of a page's table, its pictures, and everything it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.fetched, self.pictures, self.text, self.inside = [], [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data"):
                (self.pictures if value.startswith("data:image/png;base64,") else self.fetched).append(value)

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")


def markdown_rows(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


@pytest.fixture(scope="module")
def written(tmp_path_factory, pictures):
    path = tmp_path_factory.mktemp("report")
    runs = {v: write_run(path / mode.folder(v), v, a, (0, 1, 2)) for v, a in ACCURACY.items()}
    with pictures():
        report.write(path, runs, {"resnet14": "the loss is not finite"})
    return path


def test_the_tables_numbers_by_another_way(written):
    head, *rows = markdown_rows((written / "report.md").read_text())
    assert head[:3] == ["model", "regulator", "parameters"] and "published" not in head
    assert [row[0] for row in rows] == list(ACCURACY)
    assert [row[1] for row in rows] == ["—", "ConvLSTM", "—"]
    errors = {name: [100 * (1 - a) for a in values] for name, values in ACCURACY.items()}
    for row in rows:
        assert row[2] == "1,234"
        own = errors[row[0]]
        assert row[4] == f"{statistics.fmean(own):.2f} ± {statistics.stdev(own):.2f}"
        top5 = [error / 2 for error in own]
        assert row[5] == f"{statistics.fmean(top5):.2f} ± {statistics.stdev(top5):.2f}"
        assert row[7] == "1 h 02 min"
    assert rows[0][6] == "baseline"
    for row in rows[1:]:
        test = scipy.stats.ttest_ind(errors[row[0]], errors["resnet8"], equal_var=False)
        low, high = test.confidence_interval(0.95)
        between = statistics.fmean(errors[row[0]]) - statistics.fmean(errors["resnet8"])
        assert row[6].replace("−", "-") == f"{between:+.2f} ({low:+.2f} to {high:+.2f})"


def test_multiply_adds_by_hand(written):
    # Stem, three stages of one block each on 8×8, 4×4 and 2×2 pixels, two of them with a 1×1 shortcut, and head.
    stem, head = 64 * 9 * 16, 64 * 10
    stages = [
        64 * 9 * 16 * 16 * 2,
        16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32),
        4 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64),
    ]
    result = compare.read("resnet8", written / "resnet8")
    assert result.multiply_adds == stem + sum(stages) + head


def test_the_words_of_the_report(written):
    text = (written / "report.md").read_text()
    assert "3 models on digits, 3 seeds each" in text
    assert "lowest mean test error is that of regnet8_convlstm kernel=dense: 4.17 ± 1.04 %" in text
    assert "(the interval excludes 0): regnet8_convlstm kernel=dense." in text
    assert "resnet14 failed and is left out: the loss is not finite" in text
    for word in (
        "Welch",
        "95 %",
        "15 epochs",
        "`python -m a --b='<c>'`",
        "2 × T<4>, 16 CPU cores",
        "jax 1.2",
        "finished: 2026-02-09 to 2026-02-15\n",
        "early stages",
    ):
        assert word in text
    figures = re.findall(r"\]\((figures/.*?)\)", text)
    assert len(figures) == 2
    for name in figures:
        assert np.asarray(Image.open(written / name)).std() > 0


def test_the_page_needs_nothing_else_and_says_the_same(written):
    source = (written / "report.html").read_text()
    page = Page(source)
    assert page.fetched == [] and "url(" not in source and "@import" not in source and "<script" not in source
    assert page.rows == markdown_rows((written / "report.md").read_text())
    assert "python -m a --b='<c>'" in page.text and "resnet14 failed" in page.text
    pictures = [Image.open(io.BytesIO(base64.b64decode(p.partition(",")[2]))) for p in page.pictures]
    # Each figure first for a dark page, then for a light one.
    corners = [np.mean(picture.convert("L").getpixel((0, 0))) for picture in pictures]
    assert len(pictures) == 4 and corners[0] < 50 < 200 < corners[1] and corners[2] < 50 < 200 < corners[3]
    assert 'name="viewport"' in source and "prefers-color-scheme: dark" in source


def test_one_seed_has_no_spread(tmp_path):
    runs = {v: write_run(tmp_path / mode.folder(v), v, a[:1], (7,), 5) for v, a in list(ACCURACY.items())[:2]}
    report.write(tmp_path, runs)
    head, *rows = markdown_rows((tmp_path / "report.md").read_text())
    assert "top-5" not in " ".join(head) and "time, 1 seed" in head
    assert [row[4] for row in rows] == ["10.00", "5.00"] and [row[5] for row in rows] == ["baseline", "−5.00"]
    text = (tmp_path / "report.md").read_text()
    assert "±" not in text.partition("![")[0] and "seed 7" in text and "may be chance" in text


def test_a_model_that_lost_seeds_is_reported_with_those_that_are_left(tmp_path):
    runs = {v: write_run(tmp_path / mode.folder(v), v, a[:2], (0, 1)) for v, a in list(ACCURACY.items())[:2]}
    path = next(iter(runs.values())) / "results.json"
    results = json.loads(path.read_text())
    del results["seeds"]["0"]
    path.write_text(json.dumps(results | {"failed": {"0": "the loss is not finite at step 3 of seed 0"}}))
    (runs["regnet8_convlstm kernel=dense"] / "metrics.jsonl").write_text('{"step": 1, "epo')
    report.write(tmp_path, runs)
    text = (tmp_path / "report.md").read_text()
    assert "# 2 models on digits, 1 to 2 seeds each" in text and "time, 1 to 2 seeds" in text
    assert "One seed (resnet8) says nothing" in text and "contains 0" not in text
    assert "over the seeds of each model (resnet8: 1; regnet8_convlstm kernel=dense: 0, 1)" in text


def test_the_commands_of_all_runs_are_said(tmp_path):
    paths = [write_run(tmp_path / f"seed{seed}", "resnet8", [0.9], (seed,)) for seed in (0, 1)]
    for seed, path in enumerate(paths):
        results = json.loads((path / "results.json").read_text())
        (path / "results.json").write_text(json.dumps(results | {"command": f"train --seed={seed}"}))
    report.write(tmp_path, {"resnet8": paths})
    text = (tmp_path / "report.md").read_text()
    assert "train --seed=0" in text and "train --seed=1" in text


def test_the_recipe_says_what_does_not_decay():
    settings = compare_digits.get_config().optimizer
    said = []
    for settings.decayed in ("all", "kernels", "outside_regulators"):
        said.append(report.describe_decay(settings))
    assert said == [
        "weight decay 0.005",
        "weight decay 0.005 of kernels alone",
        "weight decay 0.005, none of regulators",
    ]


def test_the_curves_are_those_of_each_seed(written):
    result = compare.read("resnet8", written / "resnet8")
    epochs, values = result.curves["error"]
    assert epochs.tolist() == [1, 2] and values.shape == (3, 2)
    np.testing.assert_allclose(values[:, 1], [100 * (1 - a) for a in ACCURACY["resnet8"]])
    np.testing.assert_allclose(values[:, 0], [100 * (1 - a / 2) for a in ACCURACY["resnet8"]])
    np.testing.assert_allclose(result.curves["train_loss"][1][1], [1 - 0.92 / 2, 1 - 0.92])


# The comparison


def test_a_model_that_fails_does_not_keep_the_others_from_the_report(tmp_path):
    config = compare_digits.get_config()
    config.compare.models, config.compare.seeds = tuple(ACCURACY), (0, 1, 2)
    trained = []

    def train(config, path, seeds):
        trained.append((config.model.name, config.model.overrides.kernel, seeds))
        if config.model.name == "regnet8_convlstm":
            raise NonFiniteError("the loss is not finite at step 3 of seed 1")
        variant = next(v for v in ACCURACY if mode.folder(v) == path.name)
        write_run(path, variant, ACCURACY[variant], seeds)

    with pytest.raises(NonFiniteError, match="1 of 3 models failed: regnet8_convlstm kernel=dense"):
        mode.compare(config, tmp_path / "c", train)
    names = ["resnet8", "regnet8_convlstm", "regnet8_convgru"]
    assert trained == [(name, "dense" if "lstm" in name else None, (0, 1, 2)) for name in names]
    text = (tmp_path / "c" / "report.md").read_text()
    assert len(markdown_rows(text)) == 3 and "step 3 of seed 1" in text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"compare.models": ()}, "compare.models is ()"),
        ({"compare.seeds": ()}, "compare.seeds is ()"),
        ({"eval.every_epochs": 0}, "eval.every_epochs is 0"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_done(change, words, tmp_path):
    config = compare_digits.get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError) as error:
        mode.compare(config, tmp_path / "c", lambda *_: pytest.fail("it trained"))
    assert words in str(error.value) and not (tmp_path / "c").exists()


TINY = [
    "--mode=compare",
    "--config=configs/compare_digits.py",
    "--config.model.overrides.width=4",
    "--config.train.batch_size=32",
    "--config.train.epochs=3",
    "--config.train.max_steps=4",
    "--config.eval.batch_size=25",
    "--config.eval.every_epochs=1",
    "--config.compare.models=('resnet8', 'resnet8 shortcut=A')",
    "--config.compare.seeds=(0,1)",
]


def test_stopped_in_its_second_model_it_goes_on_from_there(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "compare_digits"
    first, second = path / "resnet8", path / "resnet8-shortcut-A"
    monkeypatch.setattr(sys, "argv", ["regnet-flax", *TINY])  # the report shows it
    train = Trainer.train

    def signalled(self, state, totals, step, count):
        if step == 2 and second.exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, state, totals, step, count)

    with few_digits(), shallow("resnet8", stage_sizes=(1, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", signalled)
            out = run_program(*TINY, cwd=tmp_path, check=143).stdout
        assert "model 2 of 2: resnet8 shortcut=A" in out and "seeds 0, 1" in out
        assert (first / "results.json").exists() and not (second / "results.json").exists()
        assert not (path / "report.md").exists()

        before = (first / "metrics.jsonl").stat().st_mtime_ns
        out = run_program(*TINY, cwd=tmp_path, check=0).stdout
    assert "holds a finished run" in out and "resuming from the checkpoint" in out
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before
    head, *rows = markdown_rows((path / "report.md").read_text())
    for row, workdir in zip(rows, (first, second), strict=True):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [4]
        errors = [100 * (1 - lines[-1]["seeds"][seed]["eval_accuracy"]) for seed in ("0", "1")]
        error = f"{statistics.fmean(errors):.2f} ± {statistics.stdev(errors):.2f}"
        assert row[head.index("top-1 error, %")] == error
        assert any(row[0] in line and error in line for line in out.splitlines())  # the table is also printed
    assert "--mode=compare" in (path / "report.md").read_text()
    assert Page((path / "report.html").read_text()).rows == [head, *rows]


def test_apart_needs_a_divided_folder_and_a_folder_of_its_own(tmp_path):
    config = compare_digits.get_config()
    config.compare.models, config.compare.seeds, config.compare.together = ("resnet8",), (0, 1), "apart"
    (tmp_path / "c" / "resnet8").mkdir(parents=True)
    (tmp_path / "c" / "resnet8" / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="compare.together is apart, and .* holds seeds that were trained together"):
        mode.compare(config, tmp_path / "c", lambda *_, **__: pytest.fail("trained"))
    config.dataset.name, config.dataset.data_dir = "folder", str(tmp_path / "photos")
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no train/ and test/, so each seed would be tested on other images"):
        mode.compare(config, tmp_path / "d", lambda *_, **__: pytest.fail("trained"))


def test_apart_every_seed_is_a_run_of_its_own(tmp_path):
    config = compare_digits.get_config()
    config.compare.models, config.compare.seeds, config.compare.together = tuple(ACCURACY)[:2], (0, 1), "apart"
    path, failing, trained = tmp_path / "c", {("resnet8", 1)}, []

    def train(config, workdir, seeds):
        (seed,) = seeds
        if (config.model.name, seed) in failing:
            raise NonFiniteError("the loss is not finite at step 3")
        variant = next(v for v in ACCURACY if mode.folder(v) == workdir.parent.name)
        if not workdir.exists():
            trained.append((config.model.name, seed))
            write_run(workdir, variant, [ACCURACY[variant][seed]], seeds)

    with pytest.raises(NonFiniteError, match="1 of 4 runs failed: resnet8, seed 1"):
        mode.compare(config, path, train)
    assert trained == [("resnet8", 0), ("regnet8_convlstm", 0), ("regnet8_convlstm", 1)]
    text = (path / "report.md").read_text()
    assert "resnet8, seed 1 failed and is left out: the loss is not finite at step 3" in text
    assert markdown_rows(text)[1][4] == "10.00"

    failing.clear()
    trained.clear()
    config.compare.seeds = (0, 1, 2)
    mode.compare(config, path, train)
    assert trained == [("resnet8", 1), ("resnet8", 2), ("regnet8_convlstm", 2)]
    for variant in config.compare.models:
        apart = compare.read(variant, *(path / mode.folder(variant) / f"seed{seed}" for seed in range(3)))
        run = write_run(tmp_path / "t" / mode.folder(variant), variant, ACCURACY[variant], (0, 1, 2))
        together = compare.read(variant, run)
        for name in ("seeds", "error", "top5_error", "parameters", "multiply_adds"):
            assert getattr(apart, name) == getattr(together, name), name
        assert apart.seconds == 3 * together.seconds
        for name, (epochs, values) in together.curves.items():
            np.testing.assert_array_equal(apart.curves[name][0], epochs)
            np.testing.assert_array_equal(apart.curves[name][1], values)

    # A seed that was evaluated less often.
    metrics = path / "resnet8" / "seed1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[-1])
    epochs, values = compare.read("resnet8", *(path / "resnet8" / f"seed{seed}" for seed in range(3))).curves["error"]
    assert epochs.tolist() == [2] and values.shape == (3, 1)
