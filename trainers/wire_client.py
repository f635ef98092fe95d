"""A receiver that is served by a stock vLLM: messages go there as `prompt_embeds`.

    wire.prompt_embeds(name, message, prompts) -> rows (T, H) -> base64 of torch.save -> /v1/completions -> texts

Soft bridges only: keys and values, and adapters, no server takes. The server is started with

    vllm serve MODEL --enable-prompt-embeds

and for callers that are trusted: vLLM may fall over embeddings of another size than its model's. Field and form are
those of vLLM's documentation (features/prompt_embeds; vLLM 0.32).
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch

from modeling_latentforge import LatentForgeWire
from modeling_latentforge.modeling_wire import LatentForgeWireOutput

from .teachers.env import Secret
from .teachers.flow import FlowConfig
from .teachers.http_server import HTTPServer


def encode_row(row: torch.Tensor) -> str:
    """`(T, H)` embeddings as vLLM takes them.

    Raises:
        ValueError: another shape or type of numbers, or numbers that are not finite.
    """
    if row.ndim != 2 or not len(row) or row.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"a row of embeddings is (T, H) in float32, bfloat16 or float16, got {tuple(row.shape)} in {row.dtype}"
        )
    if not row.isfinite().all():
        raise ValueError("a row of embeddings holds numbers that are not finite")
    buffer = io.BytesIO()
    # a copy: of a view, torch.save writes all that it is a view of
    torch.save(row.detach().cpu().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class WireClient:
    """Asks a receiver that is elsewhere.

    Args:
        url: of the server, with or without `/v1`.
        model: under which name it serves the receiver; None: the first that it names.
        key: its API key.
        config: how many requests at once, how long to wait; see [`FlowConfig`].

    Raises:
        ImportError: the extra `teachers` is not installed.
        ValueError: `url` is no plain address, or the server names no model.
    """

    def __init__(
        self, url: str, model: str | None = None, key: Secret | None = None, config: FlowConfig | None = None
    ):
        self.server = HTTPServer(url, key=key, config=config)
        if model is None:
            reply = self.server.ask("GET", "/v1/models")
            entries = reply.get("data") if isinstance(reply, dict) else None
            if not entries:
                self.close()
                raise ValueError(f"{self.server.url}: /v1/models names no model: give its name.")
            model = entries[0]["id"]
        self.model = model

    def generate(
        self,
        wire: LatentForgeWire,
        name: str,
        message: LatentForgeWireOutput,
        prompts: Sequence[str],
        max_new_tokens: int = 32,
        **options: Any,
    ) -> list[str]:
        """[`LatentForgeWire.generate`] by the server; greedy.

        Args:
            name: of the receiver, attached here too: its embeddings and template make the rows.
            options: further fields of a completion, `temperature` and the like.

        Raises:
            ValueError: a bridge that is not soft, or a server that refuses.
        """
        rows = wire.prompt_embeds(name, message, prompts)
        stop = wire.receiver(name).tokenizer.eos_token_id
        return self.complete(rows, max_new_tokens, **{"stop_token_ids": [stop], **options})

    def complete(self, rows: Sequence[torch.Tensor], max_new_tokens: int = 32, **options: Any) -> list[str]:
        """Texts behind rows `(T, H)` of embeddings, one a row, without white space at their ends."""
        bodies = [
            {
                "model": self.model,
                "prompt_embeds": encode_row(row),
                "max_tokens": max_new_tokens,
                "temperature": 0.0,
                **options,
            }
            for row in rows
        ]
        replies = self.server.flow.map(lambda body: self.server.send("POST", "/v1/completions", body), bodies)
        return [self._text(reply) for reply in replies]

    def _text(self, reply: Any) -> str:
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not choices or not isinstance(choices[0].get("text"), str):
            raise ValueError(f"{self.server.url}: /v1/completions answers without a text: it is no vLLM server.")
        return choices[0]["text"].strip()

    def close(self) -> None:
        self.server.close()


__all__ = ["WireClient", "encode_row"]
