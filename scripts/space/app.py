"""A student in a browser: text that comes patch by patch, the latents behind it, and the codec at play. Or an idea
model: what lies between two texts, what every step of thinking says, and where texts lie.

    make space                                                    # runs/demo/student at http://127.0.0.1:7860
    LATENTFORGE_MODEL=my-name/my-student python scripts/space/app.py

Everything that it needs of LatentForge comes with the model (`trust_remote_code`), so this file alone makes a Hugging
Face Space. Variables of the environment: LATENTFORGE_MODEL, the models to choose from, the first one loaded (ids or
folders, separated by blanks); LATENTFORGE_TEACHER, a token model whose speed stands beside the student's;
LATENTFORGE_RECEIVER, the language model that reads idea models, where they do not name it themselves;
LATENTFORGE_ANY_MODEL=1 lets visitors name any other model. Its code then runs here: only where the visitor is you.
"""

import contextlib
import html
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import snapshot_download  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402


with contextlib.suppress(ImportError):  # a checkout's own code, where there is one, and not the model's copy
    import modeling_latentforge  # noqa: F401

MODELS = os.environ.get("LATENTFORGE_MODEL", "runs/demo/student").split()
TEACHER = os.environ.get("LATENTFORGE_TEACHER")
RECEIVER = os.environ.get("LATENTFORGE_RECEIVER")
ANY_MODEL = os.environ.get("LATENTFORGE_ANY_MODEL") == "1"
COLOURS = ("#cfe8ff", "#ffe3c2", "#d9f2d0", "#f3d6ee", "#fff3b0", "#d6e0f5")
MOST_TOKENS, LONGEST_PROMPT, MOST_PATCHES = 512, 20_000, 256
ALPHAS, MOST_STEPS, MOST_TEXTS = 11, 16, 64


# -- models


@dataclass
class Loaded:
    """A model that is here, and what was measured with it."""

    name: str
    model: Any
    tokenizer: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    tokens_per_second: dict[int, float] = field(default_factory=dict)

    @property
    def patch_size(self) -> int:
        return getattr(self.model.config, "patch_size", 1)


LOADED: dict[str, Loaded] = {}
LOADING = threading.Lock()
IDEA = "latentforge_idea"  # as its configuration says


def load(name: str) -> Loaded:
    """A model by folder or id; the last two are kept.

    Raises:
        gr.Error: it is not one of those that may be loaded, or cannot be.
    """
    name = (name or "").strip()
    if name not in MODELS and name != TEACHER and not ANY_MODEL:
        raise gr.Error(f"This Space offers {', '.join(MODELS)}.")
    with LOADING:
        if name not in LOADED:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
                if AutoConfig.from_pretrained(name, trust_remote_code=True).model_type == IDEA:
                    model = AutoModel.from_pretrained(name, **options).to(device).eval()
                    attach(model, tokenizer, name)
                else:
                    model = AutoModelForCausalLM.from_pretrained(name, **options).to(device).eval()
            except Exception as error:  # whatever a Hub, a folder or a model's code raises
                raise gr.Error(f"{name} cannot be loaded: {str(error)[:300]}") from error
            while len(LOADED) >= 3:
                del LOADED[next(iter(LOADED))]
            LOADED[name] = Loaded(name, model, tokenizer)
        return LOADED[name]


def attach(model: Any, tokenizer: Any, name: str) -> None:
    """Give an idea model the tokenizer and the language model that it is saved without, with the adapter (LoRA) that
    lies beside the idea model, where it has one.

    Raises:
        ValueError: nothing says which language model, or it is not the one that the model was trained for.
    """
    if model.config.source == "tokens":
        model.attach_tokenizer(tokenizer)
    place, bridges = RECEIVER or model.config.receiver, list(model.config.bridges)
    if place is None or len(bridges) != 1:
        raise ValueError(
            f"it has bridges to {bridges}, and does not say where one language model that reads lies: set "
            "LATENTFORGE_RECEIVER to its folder or id."
        )
    reader = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    adapter = f"receivers/{bridges[0]}"
    folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns=f"{adapter}/*")
    if os.path.isdir(os.path.join(folder, adapter)):
        from peft import PeftModel

        reader = PeftModel.from_pretrained(reader, os.path.join(folder, adapter))
    reader.to(model.device)
    receiver = sys.modules[type(model).__module__].Receiver  # of the model's own code
    model.attach(bridges[0], receiver(reader, AutoTokenizer.from_pretrained(place), model.template(bridges[0])))


def student(name: str) -> Loaded:
    loaded = load(name)
    if not hasattr(loaded.model.config, "patch_size"):
        raise gr.Error(f"{name} is no student of LatentForge: its configuration has no patch_size.")
    return loaded


def idea_model(name: str) -> Loaded:
    loaded = load(name)
    if loaded.model.config.model_type != IDEA:
        raise gr.Error(f"{name} is no idea model of LatentForge: it is a {loaded.model.config.model_type} model.")
    return loaded


def describe(name: str) -> str:
    """What is loaded, in a line of Markdown."""
    loaded = load(name)
    config, count = loaded.model.config, sum(x.numel() for x in loaded.model.parameters())
    if config.model_type == IDEA:
        return (
            f"**{config.num_latents}** ideas of {config.latent_size} numbers, read by {', '.join(config.bridges)} as "
            f"{config.prefix_len} vectors, {config.steps} steps of thinking unless told otherwise, "
            f"{count / 1e6:.1f} M weights beside the reader's, on {loaded.model.device}"
        )
    loaded = student(name)
    return (
        f"**K = {config.patch_size}** tokens per step, latents of {config.latent_size} numbers, "
        f"{count / 1e6:.1f} M weights, {config.head_config.head_type} head, {config.decoder_type} decoder, "
        f"on {loaded.model.device}"
    )


def encode(loaded: Loaded, prompt: str) -> torch.Tensor:
    """Ids `(1, T)`; an empty prompt is the start of a text."""
    if len(prompt) > LONGEST_PROMPT:
        raise gr.Error(f"The prompt has {len(prompt)} characters, at most {LONGEST_PROMPT} are taken.")
    ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = ids or [next(i for i in (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id, 0) if i is not None)]
    return torch.tensor([ids], device=loaded.model.device)


# -- writing


class Tokens(BaseStreamer):
    """Hands tokens over as they come; None ends them, an exception is raised where they are read."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Any] = queue.Queue()
        self.prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        for token in value.reshape(-1).tolist():
            self.queue.put(token)

    def end(self) -> None:
        self.queue.put(None)


class Stopped(StoppingCriteria):
    """Ends a text whose reader has gone."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@contextlib.contextmanager
def latents_of(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the latent of every step of the backbone."""
    made: list[torch.Tensor] = []
    plain = model.sample_latents

    def sample(condition: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        latents = plain(condition, *args, **kwargs)
        made.append(latents[0, -1].float().cpu())
        return latents

    model.sample_latents = sample
    try:
        yield made
    finally:
        del model.sample_latents


def generate(
    loaded: Loaded, ids: torch.Tensor, count: int, temperature: float, top_p: float, top_k: int, seed: int
) -> Iterator[int]:
    """Tokens as they come."""
    tokens, gone = Tokens(), threading.Event()
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": int(top_k)}

    def work() -> None:
        try:
            with torch.inference_mode():
                torch.manual_seed(int(seed))
                loaded.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=int(count),
                    streamer=tokens,
                    stopping_criteria=StoppingCriteriaList([Stopped(gone)]),
                    **sampling,
                )
        except Exception as error:
            tokens.queue.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (token := tokens.queue.get()) is not None:
            if isinstance(token, Exception):
                raise gr.Error(str(token)[:300])
            yield token
    finally:
        gone.set()
        thread.join()


def speed_of_teacher(loaded: Loaded, ids: torch.Tensor, count: int = 64) -> float:
    """Tokens/s of the token model, greedy, once per length of prompts."""
    length = ids.shape[1]
    if length not in loaded.tokens_per_second:
        begun, number = time.perf_counter(), 0
        for _ in generate(loaded, ids, count, 0.0, 1.0, 0, 0):
            number += 1
        loaded.tokens_per_second[length] = number / (time.perf_counter() - begun)
    return loaded.tokens_per_second[length]


def coloured(prompt: str, patches: list[str]) -> str:
    """The text as HTML, a colour for each patch."""
    spans = [f'<span class="prompt">{html.escape(prompt)}</span>']
    for number, text in enumerate(patches):
        colour = COLOURS[number % len(COLOURS)]
        style = f'style="background:{colour}" title="step {number + 1}"'
        spans.append(f'<span class="patch" {style}>{html.escape(text)}</span>')
    return f'<div class="written">{"".join(spans)}</div>'


def figures(loaded: Loaded, num_tokens: int, num_steps: int, seconds: float, teacher: str) -> str:
    per_step = num_tokens / max(num_steps, 1)
    return (
        f"{num_tokens} tokens in {num_steps} steps of the backbone: **{per_step:.1f} tokens per step**, "
        f"**{num_tokens / max(seconds, 1e-9):.0f} tokens/s**{teacher}"
    )


def write(
    name: str, prompt: str, count: int, temperature: float, top_p: float, top_k: int, seed: int
) -> Iterator[tuple[str, str, Any]]:
    """Text, figures and the picture of the latents, after every patch."""
    loaded = student(name)
    ids = encode(loaded, prompt)
    with loaded.lock, latents_of(loaded.model) as latents:
        patches, pending, written = [], [], []
        # an autoregressive decoder's patches begin with the text, a parallel one's with what is written
        place = ids.shape[1] if loaded.model.config.decoder_type == "autoregressive" else 0
        begun = time.perf_counter()
        for token in generate(loaded, ids, count, temperature, top_p, top_k, seed):
            written.append(token)
            pending.append(token)
            if (place + len(written)) % loaded.patch_size == 0:
                before = loaded.tokenizer.decode(written[: -len(pending)], skip_special_tokens=True)
                text = loaded.tokenizer.decode(written, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # half a character waits for its other half
                    patches.append(text[len(before) :])
                    pending = []
                    seconds = time.perf_counter() - begun
                    yield coloured(prompt, patches), figures(loaded, len(written), len(latents), seconds, ""), None
        if pending:
            before = loaded.tokenizer.decode(written[: -len(pending)], skip_special_tokens=True)
            patches.append(loaded.tokenizer.decode(written, skip_special_tokens=True)[len(before) :])
        seconds = time.perf_counter() - begun
        steps = list(latents)
    teacher = ""
    if TEACHER is not None:
        token_model = load(TEACHER)
        with token_model.lock:
            teacher = f"; the teacher writes {speed_of_teacher(token_model, encode(token_model, prompt)):.0f} tokens/s"
    yield coloured(prompt, patches), figures(loaded, len(written), len(steps), seconds, teacher), trajectory(steps)


def plane(points: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Points `(B, D)` on the two directions in which they differ most, `(B, 2)`, and these directions' share of their
    variance."""
    centred = points - points.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    share = (values[:2].square().sum() / values.square().sum().clamp_min(1e-12)).item()
    return centred @ directions[:2].T, share


def trajectory(latents: list[torch.Tensor]) -> Any:
    """The latents' way on the two directions in which they differ most."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    if len(latents) >= 3:
        flat, share = plane(torch.stack(latents))
        axes.plot(flat[:, 0], flat[:, 1], color="0.8", linewidth=1, zorder=1)
        axes.scatter(flat[:, 0], flat[:, 1], c=range(len(flat)), cmap="viridis", s=25, zorder=2)
        for number in (0, len(flat) - 1):
            axes.annotate(f"step {number + 1}", flat[number].tolist(), fontsize=8)
        axes.set_title(f"latents of {len(latents)} steps, {share:.0%} of their variance", fontsize=9)
    else:
        axes.set_title("a picture needs three steps", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    plt.close(figure)
    return figure


# -- the codec


def reconstruct(name: str, text: str, noise: float, seed: int = 0) -> tuple[str, str]:
    """Text -> latents -> noise -> text: HTML that marks what is wrong, and figures."""
    loaded = student(name)
    codec, size = loaded.model.autoencoder, loaded.patch_size
    ids = encode(loaded, text)[:, : MOST_PATCHES * size]
    filler = loaded.tokenizer.pad_token_id
    filler = loaded.tokenizer.eos_token_id if filler is None else filler
    padding = -ids.shape[1] % size
    whole = torch.nn.functional.pad(ids, (0, padding), value=filler or 0)
    with loaded.lock, torch.inference_mode():
        latents = codec.encode(whole).mean
        torch.manual_seed(int(seed))
        latents = latents + noise * torch.randn_like(latents)
        read = codec.decode(latents).argmax(-1).reshape(1, -1)[:, : ids.shape[1]]
    right = (read == ids)[0].tolist()
    spans = [
        f'<span class="{"right" if same else "wrong"}">{html.escape(loaded.tokenizer.decode([token]))}</span>'
        for token, same in zip(read[0].tolist(), right, strict=True)
    ]
    exact = [all(right[start : start + size]) for start in range(0, len(right), size)]
    told = (
        f"{len(right)} tokens in {len(exact)} latents: **{sum(right) / len(right):.1%}** of the tokens and "
        f"**{sum(exact) / len(exact):.1%}** of the patches come back"
    )
    return f'<div class="written">{"".join(spans)}</div>', told


# -- ideas


@contextlib.contextmanager
def thinking(name: str, texts: list[str]) -> Iterator[Any]:
    """The idea model, alone with these texts; what it has to say against them reaches the visitor.

    Raises:
        gr.Error: no idea model, an empty text, one that it cannot read.
    """
    if not texts or not all(text and text.strip() for text in texts):
        raise gr.Error("There is an empty text, of which nothing can be thought: write one.")
    longest = max(map(len, texts))
    if longest > LONGEST_PROMPT:
        raise gr.Error(f"A text has {longest} characters, at most {LONGEST_PROMPT} are taken.")
    loaded = idea_model(name)
    with loaded.lock:  # no mode of torch: those belong to a thread, and a generator's steps may run in several
        try:
            yield loaded.model
        except ValueError as error:
            raise gr.Error(str(error)[:300]) from error


def lines(said: list[tuple[str, str, str]]) -> str:
    """Labels, their colours and texts as HTML, a line each; a text that is the one above it is pale."""
    rows, before = [], None
    for label, colour, text in said:
        kind = "read same" if text == before else "read"
        mark = f'<span class="mark" style="background:{colour}">{html.escape(label)}</span>'
        rows.append(f'<div class="{kind}">{mark}{html.escape(text)}</div>')
        before = text
    return f'<div class="written">{"".join(rows)}</div>'


def between(name: str, first: str, second: str, kind: str, count: int) -> Iterator[str]:
    """What the model says from one text to the other, a line an alpha."""
    said: list[tuple[str, str, str]] = []
    with thinking(name, [first, second]) as model:
        for place in range(ALPHAS):
            alpha = place / (ALPHAS - 1)
            text = model.interpolate_and_generate(first, second, alpha, kind, max_new_tokens=int(count))
            blue, red = round(225 - 185 * alpha), round(40 + 185 * alpha)
            said.append((f"{alpha:.1f}", f"rgb({red},115,{blue})", text))
            yield lines(said)


def think(name: str, text: str, steps: int, count: int) -> str:
    """What the ideas of a text say before the first step of thinking, and after each."""
    with thinking(name, [text]) as model, torch.no_grad():
        thoughts = model.encode([text], steps=int(steps)).thoughts
        read = [model.read(ideas, max_new_tokens=int(count))[0] for ideas in thoughts]
    return lines([(f"step {number}", "#666", said) for number, said in enumerate(read)])


def where(name: str, texts: str, steps: int) -> Any:
    """Texts, a line each, on the two directions in which their ideas differ most, and the way that thinking takes
    them."""
    labels = [line.strip() for line in (texts or "").splitlines() if line.strip()]
    if len(labels) > MOST_TEXTS:
        raise gr.Error(f"There are {len(labels)} texts, at most {MOST_TEXTS} are taken.")
    with thinking(name, labels) as model, torch.no_grad():
        thoughts = [ideas.flatten(1).float().cpu() for ideas in model.encode(labels, steps=int(steps)).thoughts]
    if len(labels) * len(thoughts) < 3 or thoughts[0].shape[1] < 2:
        raise gr.Error("A map needs three ideas of two numbers: write more texts, a line each, or take more steps.")
    flat, share = plane(torch.cat(thoughts))
    ways = flat.view(len(thoughts), len(labels), 2)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    for number, label in enumerate(labels):
        (line,) = axes.plot(*ways[:, number].T.tolist(), linewidth=1, alpha=0.6)
        axes.plot(*ways[-1:, number].T.tolist(), "o", color=line.get_color(), markersize=4)
        axes.annotate(label[:24], ways[-1, number].tolist(), fontsize=8, parse_math=False)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"{len(labels)} texts after {int(steps)} steps, {share:.0%} of their variance", fontsize=9)
    plt.close(figure)
    return figure


# -- the page


CSS = """
.written {white-space: pre-wrap; font-family: monospace; line-height: 1.7; min-height: 4em}
.written .prompt {opacity: .65}
.written .patch {color: #111; border-radius: 3px}
.written .wrong {background: #ffb3b3; color: #111; border-radius: 3px}
.written .same {opacity: .5}
.written .mark {color: #fff; border-radius: 3px; padding: 0 .5em; margin-right: .7em}
"""


def build() -> gr.Blocks:
    with gr.Blocks(title="LatentForge") as page:
        gr.Markdown(
            "# LatentForge\nA language model that writes several tokens per step, each colour one step; or one that "
            "thinks in a few vectors, which can be read."
        )
        with gr.Row():
            name = gr.Dropdown(
                [(os.path.basename(one), one) for one in MODELS],
                value=MODELS[0],
                allow_custom_value=ANY_MODEL,
                label="Model",
                elem_id="model",
                scale=2,
            )
            facts = gr.Markdown(elem_id="facts")
        with gr.Tab("Write"):
            prompt = gr.Textbox("def main(", label="Prompt", lines=3, elem_id="prompt")
            with gr.Row():
                count = gr.Slider(1, MOST_TOKENS, 96, step=1, label="Tokens", elem_id="count")
                temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature (0: greedy)")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                top_k = gr.Slider(0, 200, 0, step=1, label="Top-k (0: all)")
                seed = gr.Number(42, label="Seed", precision=0, minimum=0)
            with gr.Row():
                run = gr.Button("Write", variant="primary", elem_id="write")
                stop = gr.Button("Stop")
            text = gr.HTML(elem_id="text")
            told = gr.Markdown(elem_id="told")
            picture = gr.Plot(label="Latents", elem_id="latents")
        with gr.Tab("Codec", id="codec"):
            original = gr.Textbox("def main(argv):\n    return len(argv)", label="Text", lines=4, elem_id="original")
            noise = gr.Slider(0, 2, 0, step=0.05, label="Noise on the latents", elem_id="noise")
            back = gr.Button("Encode and decode", elem_id="reconstruct")
            again = gr.HTML(elem_id="again")
            exactness = gr.Markdown(elem_id="exactness")
        with gr.Tab("Ideas", id="ideas"):
            first = gr.Textbox("Mia has 4 pens.", label="Text", lines=2, elem_id="first")
            second = gr.Textbox("Tom has 9 eggs.", label="Another", lines=2, elem_id="second")
            with gr.Row():
                kind = gr.Radio(["linear", "slerp"], value="linear", label="Way between them", elem_id="kind")
                length = gr.Slider(1, 128, 32, step=1, label="Tokens, at most", elem_id="length")
                steps = gr.Slider(0, MOST_STEPS, 3, step=1, label="Steps of thinking", elem_id="steps")
            with gr.Row():
                interpolating = gr.Button("From one to the other", variant="primary", elem_id="interpolate")
                reading = gr.Button("Think about the first", elem_id="think")
            strip = gr.HTML(elem_id="strip")
            several = gr.Textbox(
                "Mia has 4 pens.\nTom has 9 eggs.\nIt rains.", label="Texts, a line each", lines=4, elem_id="several"
            )
            mapping = gr.Button("Where they lie", elem_id="where")
            places = gr.Plot(label="Ideas", elem_id="places")
        interpolating.click(between, [name, first, second, kind, length], strip, api_name="between")
        reading.click(think, [name, first, steps, length], strip, api_name="think")
        mapping.click(where, [name, several, steps], places, api_name="where")
        writing = run.click(
            write, [name, prompt, count, temperature, top_p, top_k, seed], [text, told, picture], api_name="write"
        )
        stop.click(None, cancels=[writing])
        gr.on([back.click, noise.release], reconstruct, [name, original, noise], [again, exactness])
        gr.on([page.load, name.change], describe, name, facts)
    return page


if __name__ == "__main__":
    options: dict[str, Any] = {"css": CSS}
    build().queue(max_size=32).launch(server_port=int(os.environ.get("PORT", "7860")), **options)
