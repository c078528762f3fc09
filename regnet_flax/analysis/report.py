"""The report of a comparison: report.md, and a self-contained report.html."""

from __future__ import annotations

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regnet_flax.analysis import compare
from regnet_flax.analysis.compare import Result
from regnet_flax.analysis.plots import comparison
from regnet_flax.environment import describe_hardware
from regnet_flax.files import dataset_title, duration, write_text

MARKDOWN, HTML, FIGURES = "report.md", "report.html", "figures"
_NUMBERS = 2  # from here on, all columns but "published" hold numbers
_CAPTIONS = {
    "curves": "Training loss, and error on the split evaluated during training: the mean over the seeds, in a band "
    "from the lowest to the highest. "
    "The error of the first epochs is above the visible range.",
    "costs": "Test error against parameters and multiply-adds: mean ± standard deviation.",
}


def write(
    path: pathlib.Path,
    workdirs: Mapping[str, pathlib.Path | Sequence[pathlib.Path]],
    failed: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """Writes the report of finished runs; the first is the baseline.

    Args:
      path: the directory for report.md, report.html and figures/.
      workdirs: maps each model's label to its workdir, or to those of its seeds.
      failed: maps the label of each failed model, or seed of one, to the reason.

    Returns:
      The report's table, with its header first.
    """
    results = [
        compare.read(label, *([found] if isinstance(found, pathlib.Path) else found))
        for label, found in workdirs.items()
    ]
    (path / FIGURES).mkdir(parents=True, exist_ok=True)
    pictures = {}
    for dark in (False, True):
        names = {kind: path / FIGURES / f"{kind}{'-dark' if dark else ''}.png" for kind in _CAPTIONS}
        split = "validation" if results[0].chosen else "test"
        comparison.compared_curves({r.label: r.curves for r in results}, names["curves"], dark=dark, split=split)
        points = {r.label: (r.parameters, r.multiply_adds, r.error) for r in results}
        comparison.compared_costs(points, names["costs"], dark=dark)
        pictures[dark] = names
    title, said, cells, notes = _title(results), _summary(results), table(results), _notes(results, failed or {})
    facts = _facts(results)
    write_text(path / MARKDOWN, _markdown(title, said, cells, notes, facts))
    write_text(path / HTML, _html(title, said, cells, notes, facts, pictures))
    return cells


def _seeds(results: Sequence[Result]) -> str:
    least, most = min(len(r.seeds) for r in results), max(len(r.seeds) for r in results)
    if least < most:
        return f"{least} to {most} seeds"
    return f"{most} seeds" if most > 1 else "1 seed"


def _title(results: Sequence[Result]) -> str:
    count = f"{len(results)} models" if len(results) > 1 else "1 model"
    return f"{count} on {dataset_title(results[0].config['dataset'])}, {_seeds(results)} each"


def percent(values: Sequence[float]) -> str:
    """Formats the mean, with the standard deviation if there are several values; "—" if there are none."""
    if not values:
        return "—"
    spread = compare.deviation(values)
    return f"{np.mean(values):.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def _count(number: int) -> str:
    return f"{number / 1e6:.3g} M" if number >= 1e6 else f"{number / 1e3:.3g} k"


def _differs(result: Result, baseline: Result) -> bool:
    between, margin = compare.difference(result.error, baseline.error)
    return margin is not None and abs(between) > margin


def _difference(result: Result, baseline: Result) -> str:
    if result is baseline:
        return "baseline"
    between, margin = compare.difference(result.error, baseline.error)
    if margin is None:
        return _signed(between)
    return f"{_signed(between)} ({_signed(between - margin)} to {_signed(between + margin)})"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def table(results: Sequence[Result]) -> list[list[str]]:
    """Returns the report's table, with its header first; the first result is the baseline."""
    baseline = results[0]
    top5, claims = any(r.top5_error for r in results), any(r.claim for r in results)
    head = ["model", "regulator", "parameters", "multiply-adds", "top-1 error, %"]
    head += ["top-5 error, %"] * top5 + ["difference to the baseline, points", f"time, {_seeds(results)}"]
    rows = [head + ["published"] * claims]
    for r in results:
        row = [r.label, r.regulator or "—", f"{r.parameters:,}", _count(r.multiply_adds), percent(r.error)]
        row += [percent(r.top5_error)] * top5 + [_difference(r, baseline), duration(r.seconds)]
        rows.append(row + [r.claim or "—"] * claims)
    return rows


def _summary(results: Sequence[Result]) -> str:
    """Summarises the table in a few sentences."""
    best = min(results, key=lambda r: np.mean(r.error))
    said = [f"The lowest mean test error is that of {best.label}: {percent(best.error)} %."]
    if len(results) == 1:
        return said[0]
    single = [r.label for r in results if len(r.seeds) < 2]
    compared = [r for r in results[1:] if r.label not in single and results[0].label not in single]
    differing = ", ".join(r.label for r in compared if _differs(r, results[0]))
    if differing:
        said.append(f"Clearly different from the baseline, {results[0].label} (the interval excludes 0): {differing}.")
    elif compared:
        said.append(f"None differs clearly from the baseline, {results[0].label}: each interval contains 0.")
    if single:
        whose = "" if len(single) == len(results) else f" ({', '.join(single)})"
        said.append(f"One seed{whose} says nothing about the spread: a difference may be chance.")
    return " ".join(said)


def _notes(results: Sequence[Result], failed: Mapping[str, str]) -> list[str]:
    """Explains how to read the table."""
    notes = [f"{label} failed and is left out: {reason}" for label, reason in failed.items()]
    notes += [f"{r.label}: {reason}; this seed is left out" for r in results for reason in r.failed.values()]
    errors = "Errors are measured on the whole test split at the end of training, not at the best epoch"
    if results[0].chosen:
        errors = "Errors are measured once, on the whole test split, with the checkpoint that a validation split chose"
        if len(results[0].environments) > 1 and results[0].config["dataset"]["validation"]:
            errors += ", which each seed draws for itself"
    own = {r.label: ", ".join(map(str, r.seeds)) for r in results}
    seeds = own[results[0].label]
    if len(set(own.values())) > 1:
        seeds = f"of each model ({'; '.join(f'{label}: {numbers}' for label, numbers in own.items())})"
    if any(len(r.seeds) > 1 for r in results):
        notes.append(
            f"{errors}: mean ± standard deviation (n − 1) over the seeds {seeds}. Below 0 "
            "the difference is in the model's favour. Its interval is the 95 % interval of Welch's t, for two unpaired "
            "samples of unequal variance, not corrected for multiple comparisons. It describes the variation between "
            "seeds, not between test sets."
        )
    else:
        notes.append(f"{errors}, for the single seed {seeds}, and so without a spread or an interval.")
    notes.append(
        "Multiply-adds count convolutions, dense layers and regulators for one image. The time covers all seeds "
        "together, with compilation and evaluation."
    )
    if any(r.claim for r in results):
        notes.append(
            "Published figures are test errors after 200 epochs with the recipe of He et al., whatever the recipe here."
        )
    if any(r.config["model"]["overrides"].get("regulated_stages") is not None for r in results):
        notes.append("Xu et al. found that a regulator helps most in the early stages.")
    return notes


def _facts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Returns recipe, hardware, versions and commands."""
    config = results[0].config
    train, optimizer, data = config["train"], config["optimizer"], config["dataset"]
    size = "×".join(map(str, config["image_shape"]))
    augment = ", ".join(data["augment"]) or "none"
    epochs = f"{train['epochs']} epoch" + "s" * (train["epochs"] != 1)
    if train["max_steps"]:
        epochs += f", cut at step {train['max_steps']}"
    recipe = (
        f"{epochs}, batches of {train['batch_size']}, {describe_optimizer(optimizer)}, learning rate "
        f"{optimizer['learning_rate']} ({optimizer['schedule']}), {describe_decay(optimizer)}, "
        f"{config['dtype']}"
    )
    facts = [
        ("data", f"{data['name']}, {data['num_classes']} classes, {size}; augmentation: {augment}"),
        ("recipe", recipe),
    ]
    if days := [day for r in results for day in r.dates]:
        facts.append(("finished", " to ".join(dict.fromkeys((min(days), max(days))))))
    show = {"hardware": describe_hardware, "versions": lambda v: ", ".join(map(" ".join, v.items())), "command": str}
    for name in show:
        said = [environment[name] for r in results for environment in r.environments]
        facts += [(name, text) for text in dict.fromkeys(map(show[name], said))]
    return facts


def describe_optimizer(settings: Mapping[str, Any]) -> str:
    """Describes the `optimizer` section of a config, except the learning rate and the weight decay."""
    if settings.get("name", "sgd") == "sgd":
        return f"SGD with {'Nesterov ' * bool(settings['nesterov'])}momentum {settings['momentum']}"
    return f"{settings['name']} with betas {', '.join(map(str, settings['betas']))}"


def describe_decay(settings: Mapping[str, Any]) -> str:
    """Describes the weight decay in the `optimizer` section of a config."""
    of = {"kernels": " of kernels alone", "outside_regulators": ", none of regulators"}
    return f"weight decay {settings['weight_decay']:g}{of.get(settings.get('decayed', 'all'), '')}"


def _markdown(
    title: str, said: str, cells: list[list[str]], notes: Sequence[str], facts: Sequence[tuple[str, str]]
) -> str:
    head, *rows = cells
    rule = ["---:" if _is_number(i, head) else "---" for i in range(len(head))]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows)]
    parts = [f"# {title}", said, "\n".join(lines), *notes]
    parts += [f"![{kind}]({FIGURES}/{kind}.png)\n\n{caption}" for kind, caption in _CAPTIONS.items()]
    parts.append("\n".join(f"- {name}: " + (f"`{text}`" if name == "command" else text) for name, text in facts))
    return "\n\n".join(parts) + "\n"


def _is_number(column: int, head: Sequence[str]) -> bool:
    return column >= _NUMBERS and head[column] != "published"


_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #595959; --paper: #fff; --line: #d8d8d8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a8a8a8; --paper: #16181c; --line: #3a3d44 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.25 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600; font-size: .875rem; vertical-align: bottom }
.number { text-align: right; white-space: nowrap }
th.number { white-space: normal }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); min-width: 8rem }
figure { margin: 1.5rem 0 }
img { width: 100%; min-width: 40rem; height: auto; display: block }
figcaption, .notes { color: var(--soft); font-size: .875rem }
dt { font-weight: 600; margin-top: .5rem }
dd { margin: 0; overflow-wrap: anywhere }
"""


def _html(
    title: str,
    said: str,
    cells: list[list[str]],
    notes: Sequence[str],
    facts: Sequence[tuple[str, str]],
    pictures: Mapping[bool, Mapping[str, pathlib.Path]],
) -> str:
    head, *rows = cells

    def row(cells: Sequence[str], tag: str) -> str:
        inside = "".join(
            f"<{tag}{' class=number' if _is_number(i, head) else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{inside}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    figures = "\n".join(
        '<figure><div class="wide"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(pictures[True][kind])}">'
        f'<img src="{_inline(pictures[False][kind])}" alt="{html.escape(caption)}"></picture></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for kind, caption in _CAPTIONS.items()
    )
    about = "\n".join(
        f"<dt>{name}</dt><dd>{f'<code>{html.escape(text)}</code>' if name == 'command' else html.escape(text)}</dd>"
        for name, text in facts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(said)}</p>
<div class="wide"><table>
<thead>{row(head, "th")}</thead>
<tbody>
{body}
</tbody>
</table></div>
<div class="notes">{"".join(f"<p>{html.escape(note)}</p>" for note in notes)}</div>
{figures}
<h2>How it was measured</h2>
<dl>
{about}
</dl>
</body>
</html>
"""


def _inline(path: pathlib.Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
