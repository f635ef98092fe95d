"""Messages to a receiver behind HTTP: a double that reads embeddings as vLLM does, over the same tiny model."""

import base64
import io

import pytest
import torch

from modeling_latentforge import Template
from tests.modeling_latentforge.test_wire import CONTEXTS, PROMPTS, receiver, wire
from trainers.evaluation.loopback_servers import LoopbackServer
from trainers.wire_client import WireClient, encode_row


pytest.importorskip("openai")


class EmbedsServer(LoopbackServer):
    """`/v1/completions` of vLLM with `--enable-prompt-embeds`, as documented; `enabled` False: without."""

    def __init__(self, reader, enabled: bool = True):
        self.reader, self.enabled = reader, enabled
        super().__init__()

    def answer(self, method, path, body, headers):
        if path == "/v1/models":
            return 200, {}, {"object": "list", "data": [{"id": "tiny"}]}
        assert path == "/v1/completions" and body["model"] == "tiny" and "prompt" not in body
        if not self.enabled:
            message = "You must set `--enable-prompt-embeds` to input `prompt_embeds`."
            return 400, {}, {"error": {"message": message}}
        data = base64.b64decode(body["prompt_embeds"], validate=True)
        row = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        assert row.ndim == 2 and len(data) < row.numel() * row.element_size() + 2000
        ids = self.reader.model.generate(
            inputs_embeds=row[None],
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=body["max_tokens"],
            do_sample=body["temperature"] > 0,
            eos_token_id=body["stop_token_ids"],
            pad_token_id=2,
        )
        text = self.reader.tokenizer.decode(ids[0], skip_special_tokens=True)
        return 200, {}, {"object": "text_completion", "choices": [{"index": 0, "text": text}]}


@pytest.mark.parametrize("template", [Template(), Template(before="[user]", anchor="\nAnswer:")])
def test_a_server_writes_what_the_receiver_writes_here(template):
    """Rows that are padded, or lose their template, make another text of the same latents."""
    model = wire(receivers=())
    model.add_receiver("llama", receiver("llama", template), mode="soft", static_slots=2)
    message = model.encode(CONTEXTS)
    with EmbedsServer(model.receivers["llama"]) as server:
        client = WireClient(server.url)
        found = client.generate(model, "llama", message, PROMPTS, max_new_tokens=8)
        client.close()
    assert found == model.generate("llama", message, PROMPTS, max_new_tokens=8, do_sample=False)
    assert len(set(found)) > 1


def test_a_server_without_embeddings_is_told_how_to_start():
    """A status code alone sends people through the server's source."""
    model = wire()
    with EmbedsServer(model.receivers["llama"], enabled=False) as server:
        client = WireClient(server.url, "tiny")
        with pytest.raises(ValueError, match="You must set `--enable-prompt-embeds`"):
            client.generate(model, "llama", model.encode(CONTEXTS), PROMPTS)
        client.close()
    model = wire("kv")
    with EmbedsServer(model.receivers["llama"]) as server:
        client = WireClient(server.url)
        with pytest.raises(ValueError, match="embeddings carry `soft` only"):
            client.generate(model, "llama", model.encode(CONTEXTS), PROMPTS)
        client.close()


def test_what_would_bring_a_server_down_is_not_sent():
    """vLLM takes embeddings on trust."""
    whole = torch.randn(1000, 8)
    assert len(encode_row(whole[:2])) < 4000, "a view is sent as itself alone"
    row = torch.load(io.BytesIO(base64.b64decode(encode_row(whole[:2].bfloat16()))), weights_only=True)
    assert torch.equal(row, whole[:2].bfloat16())
    for wrong in (whole[0], whole[None], whole[:0], whole.double(), whole.long()):
        with pytest.raises(ValueError, match="a row of embeddings is \\(T, H\\)"):
            encode_row(wrong)
    with pytest.raises(ValueError, match="not finite"):
        encode_row(whole / 0)
