"""A student in a browser: text that comes patch by patch, the latents behind it, and the codec at play.

    make space                                                    # runs/demo/student at http://127.0.0.1:7860
    LATENTFORGE_MODEL=my-name/my-student python scripts/space/app.py

Everything that it needs of LatentForge comes with the model (`trust_remote_code`), so this file alone makes a Hugging
Face Space. Variables of the environment: LATENTFORGE_MODEL, the models to choose from, the first one loaded (ids or
folders, separated by blanks); LATENTFORGE_TEACHER, a token model whose speed stands beside the student's;
LATENTFORGE_ANY_MODEL=1 lets visitors name any other model. Its code then runs here: only where the visitor is you.
"""

import contextlib
import html
import os
import queue
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
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402


with contextlib.suppress(ImportError):  # a checkout's own code, where there is one, and not the model's copy
    import modeling_latentforge  # noqa: F401

MODELS = os.environ.get("LATENTFORGE_MODEL", "runs/demo/student").split()
TEACHER = os.environ.get("LATENTFORGE_TEACHER")
ANY_MODEL = os.environ.get("LATENTFORGE_ANY_MODEL") == "1"
COLOURS = ("#cfe8ff", "#ffe3c2", "#d9f2d0", "#f3d6ee", "#fff3b0", "#d6e0f5")
MOST_TOKENS, LONGEST_PROMPT, MOST_PATCHES = 512, 20_000, 256


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
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
                model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=torch.float32)
            except Exception as error:  # whatever a Hub, a folder or a model's code raises
                raise gr.Error(f"{name} cannot be loaded: {str(error)[:300]}") from error
            model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
            while len(LOADED) >= 3:
                del LOADED[next(iter(LOADED))]
            LOADED[name] = Loaded(name, model, tokenizer)
        return LOADED[name]


def student(name: str) -> Loaded:
    loaded = load(name)
    if not hasattr(loaded.model.config, "patch_size"):
        raise gr.Error(f"{name} is no student of LatentForge: its configuration has no patch_size.")
    return loaded


def describe(name: str) -> str:
    """What is loaded, in a line of Markdown."""
    loaded = student(name)
    config, count = loaded.model.config, sum(x.numel() for x in loaded.model.parameters())
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


def trajectory(latents: list[torch.Tensor]) -> Any:
    """The latents' way on the two directions in which they differ most."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    if len(latents) >= 3:
        points = torch.stack(latents)
        centred = points - points.mean(0)
        _, values, directions = torch.linalg.svd(centred, full_matrices=False)
        flat = centred @ directions[:2].T
        share = (values[:2].square().sum() / values.square().sum().clamp_min(1e-12)).item()
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


# -- the page


CSS = """
.written {white-space: pre-wrap; font-family: monospace; line-height: 1.7; min-height: 4em}
.written .prompt {opacity: .65}
.written .patch {color: #111; border-radius: 3px}
.written .wrong {background: #ffb3b3; color: #111; border-radius: 3px}
"""


def build() -> gr.Blocks:
    with gr.Blocks(title="LatentForge") as page:
        gr.Markdown("# LatentForge\nA language model that writes several tokens per step. Each colour is one step.")
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
