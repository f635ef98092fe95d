"""The evaluation of a model beside others, part by part; finished parts are kept and not measured again.

    held-out text -> rows without padding -> likelihood, BrierLM, generation     the same rows for every model
                  -> blocks with documents' ends -> codec

The figures of a part lie in `<work_dir>/<part>-<hash>.json`, the hash being of the model's weights, the text's ids,
the part's settings and the code that measures: whoever interrupts an evaluation repeats the command and goes on.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..verification import environment
from .benchmark import decode_rows, roofline_rows, tiled_prompts
from .brier import brier_difference, summarize_brier
from .domains import domain_patches, domain_texts, special_patches
from .generation_quality import TEMPERATURES, prompts_and_references, sampling_options, text_figures, write_texts
from .likelihood import exact_likelihood, why_no_likelihood
from .patch_draws import brier_sums, is_student, plan_positions
from .reconstruction import active_dimensions, cycle_error, reconstruction_accuracy, student_latents
from .roofline import MachineRates


PARTS = ("codec", "likelihood", "brier", "generation", "speed")
NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
PEOPLE, OTHER_PEOPLE = "the true continuation", "other held-out text"


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is measured.

    Attributes:
        positions: patch starts that BrierLM is scored at.
        likelihood_tokens: predicted tokens of the likelihood; None: all of the rows that BrierLM reads.
        codec_tokens: of each figure of a codec.
        noise_samples: latents a place, where an energy head has no other probabilities.
        resamples: of the bootstrap.
        num_texts, prompt_tokens, new_tokens: of the generation, at each of `temperatures`.
        shown: texts of each model and temperature that the report prints, the first ones.
        speed_tokens, speed_batches, repeats: of the tables of decoding and roofline.
        seed: of everything that is drawn.
    """

    positions: int = 100_000
    likelihood_tokens: int | None = None
    codec_tokens: int = 131_072
    noise_samples: int = 8
    resamples: int = 1000
    num_texts: int = 512
    prompt_tokens: int = 32
    new_tokens: int = 64
    temperatures: tuple[float, ...] = TEMPERATURES
    shown: int = 3
    speed_tokens: int = 64
    speed_batches: tuple[int, ...] = (1, 8)
    repeats: int = 3
    seed: int = 0

    def quick(self) -> "EvaluationSettings":
        """A first look: a fifth of the positions, an eighth of the texts."""
        return replace(
            self,
            positions=20_000,
            likelihood_tokens=32_768,
            codec_tokens=16_384,
            num_texts=64,
            new_tokens=48,
            temperatures=(0.7, 1.0),
            speed_tokens=32,
            speed_batches=(1,),
            repeats=2,
        )


@dataclass
class Subjects:
    """Who is judged, on which text.

    Attributes:
        models: causal LMs by name, the judged one first, in eval mode on one device.
        codec: of the judged model, or the judged model itself.
        judge: name of the token model that judges texts, one of `models`; None: nobody does.
        tokenizer: of all.
        rows: `(R, T)` ids of held-out text without padding.
        blocks: held-out blocks with padding and ends of documents, T a multiple of the codec's patch; None without a
            codec.
        patch_size: K of all scores.
        domains: name -> text, see [`domain_texts`].
    """

    models: dict[str, Any]
    codec: Any
    judge: str | None
    tokenizer: Any
    rows: torch.Tensor
    blocks: Any
    patch_size: int
    domains: Mapping[str, str] = field(default_factory=dict)


@cache
def measuring_code() -> str:
    """Hash of the code that a figure depends on: the models, and this folder without rows and reports."""
    here = Path(__file__).resolve().parent
    files = [*sorted((here.parent.parent / "modeling_latentforge").glob("*.py")), *sorted(here.glob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        if not file.name.startswith(("rows_", "evaluation_report", "wire_report")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def model_identity(model: Any) -> str:
    """Hash of a model's weights and configuration, wherever it was loaded from."""
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version", "auto_map")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _ids_hash(ids: Any) -> str:
    return hashlib.sha256(torch.as_tensor(ids).contiguous().numpy().tobytes()).hexdigest()[:16]


class Evaluation:
    """Measures the parts, keeps them, and puts them together.

    Args:
        subjects: see there.
        settings: see there.
        work_dir: where finished parts are kept.
        parts: which of `PARTS`, in that order.
        say: takes a line of progress.
        progress: wraps an iterable of the work of a part, with its name: a bar.
    """

    def __init__(
        self,
        subjects: Subjects,
        settings: EvaluationSettings,
        work_dir: str | Path,
        parts: Sequence[str] = PARTS,
        say: Callable[[str], None] = lambda line: None,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, name: items,
    ):
        unknown = [part for part in parts if part not in PARTS]
        if unknown:
            raise ValueError(f"unknown part {unknown[0]!r}: known are {', '.join(PARTS)}")
        self.subjects, self.settings, self.work_dir = subjects, settings, Path(work_dir)
        self.parts, self.say, self.progress = parts, say, progress
        self._identities: dict[int, str] = {}
        self._done, self._total = 0, 0

    # -- what is kept

    def _identity(self, model: Any) -> str:
        key = id(model)
        if key not in self._identities:
            self._identities[key] = model_identity(model)
        return self._identities[key]

    def _part(self, name: str, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` returns, or returned when it last ran with the same settings; with `seconds` and, as
        that may have been elsewhere, `measured`."""
        self._done += 1
        text = {"rows": _ids_hash(self.subjects.rows), "patch_size": self.subjects.patch_size}
        device = next(iter(self.subjects.models.values()), self.subjects.codec).device
        # of all figures these alone are the machine's as well
        where = {"machine": environment()["machine"], "device": str(device)} if name == "speed" else {}
        key = _hash(name, dict(settings), text, where, measuring_code())
        path = self.work_dir / f"{name.replace(' ', '-').replace('/', '-')}-{key}.json"
        label = f"[{self._done}/{self._total}] {name}"
        if path.exists():
            self.say(f"{label}: kept from an earlier run")
            return json.loads(path.read_text(encoding="utf-8"))
        self.say(f"{label} ...")
        start = time.perf_counter()
        found = {
            **measure(),
            "seconds": round(time.perf_counter() - start, 1),
            "measured": {"date": _now(), "device": str(device), "threads": torch.get_num_threads()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.part")
        draft.write_text(json.dumps(found) + "\n", encoding="utf-8")
        os.replace(draft, path)  # whoever interrupts this keeps whole parts only
        self.say(f"{label}: {found['seconds']:.0f} s")
        return found

    # -- the whole

    def run(self) -> dict[str, Any]:
        """All figures: `codec`, `likelihood`, `brier`, `generation`, `speed`, as far as asked for and possible, and
        `conditions`."""
        subjects, settings = self.subjects, self.settings
        models = subjects.models
        students = {name: model for name, model in models.items() if is_student(model)}
        codecs = {"": subjects.codec} if subjects.codec is not None else {}
        temperatures = len(settings.temperatures)
        counts = {
            "codec": len(codecs) + len(students),
            "likelihood": len(models),
            "brier": len(models),
            "generation": len(models) * temperatures + 1 if models else 0,
            "speed": 1 if models else 0,
        }
        self._total, self._done = sum(counts[part] for part in self.parts), 0
        report: dict[str, Any] = {}
        for part in PARTS:
            if part in self.parts and counts[part]:
                report[part] = getattr(self, f"_{part}")()
        return {"conditions": self._conditions(report), **report}

    def _conditions(self, report: Mapping[str, Any]) -> dict[str, Any]:
        subjects = self.subjects
        first = next(iter(subjects.models.values()), subjects.codec)
        conditions = {
            **environment(),
            "date": _now(),
            "threads": torch.get_num_threads(),
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
            "settings": asdict(self.settings),
            "block_size": subjects.rows.shape[1],
            "held_out_tokens": subjects.rows.numel(),
            "patch_size": subjects.patch_size,
            "judge": subjects.judge,
            "parameters": {
                name: model.num_parameters() for name, model in (subjects.models or {"codec": subjects.codec}).items()
            },
            "text": _ids_hash(subjects.rows),
        }
        return conditions

    # -- parts

    def _codec(self) -> dict[str, Any]:
        subjects, settings = self.subjects, self.settings
        codec, tokens = subjects.codec, settings.codec_tokens
        patch_size = codec.config.patch_size if codec is not None else subjects.patch_size
        found: dict[str, Any] = {}

        def measure() -> dict[str, Any]:
            patches = domain_patches(subjects.domains, subjects.tokenizer, patch_size, tokens)
            special = [i for i in (codec.config.eos_token_id, codec.config.pad_token_id) if isinstance(i, int)]
            ends = special_patches(subjects.blocks, patch_size, special)
            if len(ends):
                patches["patches with EOS or padding"] = ends
            curve = [
                reconstruction_accuracy(codec, subjects.blocks, sigma, settings.seed, max_tokens=tokens)
                for sigma in self.progress(NOISE_LEVELS, "codec, noise")
            ]
            domains = {
                name: reconstruction_accuracy(codec, [ids.reshape(-1)])
                for name, ids in self.progress(list(patches.items()), "codec, domains")
            }
            ids = _codec_ids(subjects.rows, codec, tokens)
            means = codec.encode(ids).mean.flatten(0, 1)
            return {
                "curve": curve,
                "domains": domains,
                "dimensions": active_dimensions(codec, ids),
                "cycle": {"the codec's own latents": cycle_error(codec, means)},
            }

        if codec is not None:
            texts = {name: _hash(text) for name, text in subjects.domains.items()}
            key: dict[str, Any] = {
                "codec": self._identity(codec),
                "tokens": tokens,
                "domains": texts,
                "seed": settings.seed,
            }
            key["blocks"] = _ids_hash(subjects.blocks[:]["input_ids"])
            with _eval_mode(codec):
                found = self._part("codec", key, torch.no_grad()(measure))
        for name, model in subjects.models.items():
            if not is_student(model):
                continue

            def cycle(model: Any = model) -> dict[str, Any]:
                ids = _codec_ids(subjects.rows, model, min(tokens, 32_768))
                with torch.random.fork_rng(), _eval_mode(model):
                    torch.manual_seed(settings.seed)
                    latents = torch.cat([student_latents(model, part) for part in ids.split(4)])
                    return cycle_error(model.autoencoder, latents)

            key = {"model": self._identity(model), "tokens": min(tokens, 32_768), "seed": settings.seed}
            found.setdefault("cycle", {})[name] = self._part(f"cycle {name}", key, torch.no_grad()(cycle))
        return found

    def _scored_rows(self) -> int:
        rows = self.subjects.rows
        return plan_positions(rows.shape[0], rows.shape[1], self.subjects.patch_size, self.settings.positions)[0]

    def _likelihood(self) -> dict[str, Any]:
        subjects, settings = self.subjects, self.settings
        count = self._scored_rows()
        batch = max(1, 2048 // subjects.rows.shape[1])
        ids = subjects.rows[:count].numpy()
        blocks = _Rows({"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": ids})
        found: dict[str, Any] = {}
        for name, model in subjects.models.items():
            reason = why_no_likelihood(model)
            if reason is not None:
                self._done += 1
                found[name] = {"refused": reason}
                continue
            key = {"model": self._identity(model), "rows": count, "tokens": settings.likelihood_tokens}

            def measure(model: Any = model) -> dict[str, Any]:
                limit = settings.likelihood_tokens
                return exact_likelihood(model, blocks, subjects.tokenizer, batch, limit)

            found[name] = self._part(f"likelihood {name}", key, measure)
        return found

    def _brier(self) -> dict[str, Any]:
        subjects, settings = self.subjects, self.settings
        kept: dict[str, dict[str, torch.Tensor]] = {}
        found: dict[str, Any] = {}
        for name, model in subjects.models.items():
            key: dict[str, Any] = {
                "model": self._identity(model),
                "positions": settings.positions,
                "seed": settings.seed,
            }
            if is_student(model):
                key["noise_samples"] = settings.noise_samples

            def measure(name: str = name, model: Any = model) -> dict[str, Any]:
                sums = brier_sums(
                    model,
                    subjects.rows,
                    subjects.patch_size,
                    settings.positions,
                    settings.noise_samples,
                    settings.seed,
                    lambda batches: self.progress(batches, f"BrierLM, {name}"),
                )
                return {key: value.tolist() for key, value in sums.items()}

            try:
                part = self._part(f"brier {name}", key, measure)
            except ValueError as error:  # layers that do not read the whole text
                found[name] = {"refused": str(error)}
                continue
            sums = {key: torch.tensor(part[key]) for key in ("sampled", "smooth", "counts")}
            kept[name] = sums
            found[name] = {"seconds": part["seconds"], "measured": part["measured"]}
            for form in ("sampled", "smooth"):
                found[name][form] = summarize_brier(sums[form], sums["counts"], settings.resamples, settings.seed)
        judged = next(iter(subjects.models))
        for name in kept if judged in kept else ():
            for form in ("sampled", "smooth") if name != judged else ():
                ours, theirs = ({"sums": kept[x][form], "counts": kept[x]["counts"]} for x in (judged, name))
                difference = brier_difference(ours, theirs, settings.resamples, settings.seed)
                found[name][form]["judged_less_this"] = difference
        return found

    def _generation(self) -> dict[str, Any]:
        subjects, settings = self.subjects, self.settings
        judge = None if subjects.judge is None else subjects.models[subjects.judge]
        prompts, references, others = prompts_and_references(
            subjects.rows,
            settings.num_texts,
            settings.prompt_tokens,
            settings.new_tokens,
            subjects.tokenizer.eos_token_id,
        )
        key: dict[str, Any] = {
            "prompts": _ids_hash(prompts),
            "references": _ids_hash(references),
            "shown": settings.shown,
        }
        key["judge"] = None if judge is None else self._identity(judge)

        def decode(ids: torch.Tensor) -> list[str]:
            return [subjects.tokenizer.decode(row) for row in ids[: settings.shown]]

        def people() -> dict[str, Any]:
            return {
                PEOPLE: text_figures(references, prompts, judge=judge),
                # against the wrong prompt their NLL means little; their MAUVE is the most that can be had
                OTHER_PEOPLE: text_figures(others, prompts, references, judge),
                "prompts": decode(prompts),
                "texts": decode(references),
            }

        found: dict[str, Any] = {"people": self._part("generation people", key, people), "models": {}}
        for name, model in subjects.models.items():
            points = found["models"][name] = []
            for temperature in settings.temperatures:
                try:
                    sampling_options(model, temperature)
                except ValueError as error:
                    self._done += 1
                    points.append({"temperature": temperature, "refused": str(error)})
                    continue

                def measure(name: str = name, model: Any = model, temperature: float = temperature) -> dict[str, Any]:
                    texts = write_texts(
                        model,
                        prompts,
                        settings.new_tokens,
                        temperature,
                        seed=settings.seed,
                        progress=lambda parts: self.progress(parts, f"writing, {name}, T={temperature:g}"),
                    )
                    return {**text_figures(texts, prompts, references, judge), "texts": decode(texts)}

                own = {**key, "model": self._identity(model), "temperature": temperature, "seed": settings.seed}
                point = self._part(f"generation {name} T={temperature:g}", own, measure)
                points.append({"temperature": temperature, **point})
        sizes = {"texts": len(prompts), "prompt_tokens": prompts.shape[1], "new_tokens": references.shape[1]}
        return {**found, **sizes}

    def _speed(self) -> dict[str, Any]:
        subjects, settings = self.subjects, self.settings
        first = next(iter(subjects.models.values()))
        device = first.device
        texts = subjects.rows[: max(settings.speed_batches), : settings.prompt_tokens].tolist()

        def prompts(batch: int, length: int) -> torch.Tensor:
            return tiled_prompts(texts, batch, length).to(device)

        def measure() -> dict[str, Any]:
            rates = MachineRates(device, first.dtype)
            grid = (subjects.models, prompts, settings.speed_batches, [settings.prompt_tokens])
            written: dict[str, Any] = {
                "new_tokens": settings.speed_tokens,
                "repeats": settings.repeats,
                "say": self.say,
            }
            groups = {
                "rows": decode_rows(*grid, baseline=subjects.judge, **written),
                "roofline": roofline_rows(*grid, rates, **written),
            }
            found = {
                name: [{"device": str(device), **row} for group in rows for row in group]
                for name, rows in groups.items()
            }
            return {**found, "rates": rates.record()}

        key: dict[str, Any] = {name: self._identity(model) for name, model in subjects.models.items()}
        key |= {"tokens": settings.speed_tokens, "batches": settings.speed_batches, "repeats": settings.repeats}
        return self._part("speed", {**key, "baseline": subjects.judge}, measure)


def _codec_ids(rows: torch.Tensor, model: Any, tokens: int) -> torch.Tensor:
    """The first rows, `(B, T)` of whole patches, on the model's device."""
    length = rows.shape[1] // model.config.patch_size * model.config.patch_size
    return rows[: max(1, tokens // length), :length].to(model.device)


class _Rows:
    """Columns `(R, T)` that are sliced by row, as a `datasets.Dataset` is."""

    def __init__(self, columns: Mapping[str, Any]):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: Any) -> dict[str, Any]:
        return {name: values[rows] for name, values in self.columns.items()}


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


__all__ = ["PARTS", "Evaluation", "EvaluationSettings", "Subjects", "domain_texts"]
