"""From a training script's folder to a model that strangers load, by way of a Hub on this machine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from scripts import push_to_hub, train_autoencoder, train_student
from tests.conftest import tiny_student
from tests.hub_server import HubServer
from tests.modeling_latentforge.test_idea import idea
from tests.modeling_latentforge.test_remote_code import BLOCK
from tests.modeling_latentforge.test_wire import CONTEXTS, PROMPTS, receiver, wire
from tests.trainers.training_helpers import TEXT, byte_tokenizer, tiny_teacher
from trainers.wire_lora import adapter_parameters, add_adapter
from trainers.wire_models import load_wire, save_wire


ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS = {"hf_alicewrites": "alice", "hf_aliceread": "alice", "hf_bobwrites": "bob"}
TRAINING = "--block_size 32 --max_steps 2 --save_strategy no --disable_tqdm true --use_cpu true --report_to none"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """`codec` and `student`, as the training scripts leave them."""
    room = tmp_path_factory.mktemp("room")
    (room / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT * 6))
    tiny_teacher().save_pretrained(room / "teacher")
    byte_tokenizer().save_pretrained(room / "teacher")
    common = f"--data {room}/text.jsonl --cache_dir {room}/cache {TRAINING}"
    train_autoencoder.main(
        f"{common} --tokenizer {room}/teacher --output_dir {room}/codec --patch_size 4 --latent_size 16 "
        "--hidden_size 32 --intermediate_size 48".split()
    )
    train_student.main(
        f"{common} --autoencoder {room}/codec --teacher {room}/teacher --output_dir {room}/student --hidden_size 32 "
        "--intermediate_size 64 --num_hidden_layers 1 --num_attention_heads 2".split()
    )
    return room


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, and alice logged in; for processes that start now and for this one, which read it at import."""
    with HubServer(tmp_path / "hub", TOKENS) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_alicewrites")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        yield server


def push(model: Path, repo_id: str, *flags: str) -> int:
    """The script in this process, without the clean one at its end: what it says is what counts."""
    return push_to_hub.main(["--model", str(model), "--repo_id", repo_id, "--no_verify", *flags])


def clean_process(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def usage(card: Path) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card.read_text(), re.MULTILINE | re.DOTALL)
    return code


@pytest.mark.slow
def test_the_readmes_command_uploads_and_sees_the_result_load(trained, hub, tmp_path):
    """An upload that nobody has loaded again is a hope."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\.venv/bin/python (scripts/push_to_hub\.py .*)$", readme, re.MULTILINE)
    command = command.replace("runs/demo", str(trained)).replace("my-name", "alice")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loads in a clean process: LatentForgeForCausalLM" in done.stdout
    assert hub.repos["alice/my-student"].private
    asked = [f"{method} {path}" for method, path in hub.requests]
    for step in ("POST /api/repos/create", "POST /api/models/alice/my-student/preupload/main", "PUT /lfs/"):
        assert any(request.startswith(step) for request in asked), step
    assert "hf_alicewrites" not in done.stdout + done.stderr


def test_strangers_run_the_cards_code_by_repository_id(trained, hub, tmp_path):
    """Usage that was never run is the first thing a stranger sees fail."""
    assert push(trained / "codec", "alice/codec") == 0 and push(trained / "student", "alice/student") == 0
    folders = {name: hub.folder(f"alice/{name}") for name in ("codec", "student")}
    blocks = {name: usage(folder / "README.md") for name, folder in folders.items()}
    for name, block in blocks.items():
        assert f'repo_id = "alice/{name}"' in block
        assert ModelCard.load(folders[name] / "README.md").data.model_name == name
    # loaded as people load: another dtype, the backbone's attention, a device map, the pipelines
    more = """
import sys, torch, transformers
assert not any(name.startswith(("modeling_latentforge", "trainers")) for name in sys.modules)
there = {"trust_remote_code": True}
half = transformers.AutoModelForCausalLM.from_pretrained(
    "alice/student", dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu", **there)
assert half.dtype == torch.bfloat16 and half.model.backbone.config._attn_implementation == "eager"
text = transformers.pipeline("text-generation", model="alice/student", **there)
assert text("Once", max_new_tokens=4)[0]["generated_text"].startswith("Once")
features = transformers.pipeline("feature-extraction", model="alice/codec", **there)
assert len(features("eight by")[0]) == 2 and len(features("eight by")[0][0]) == 16
try:
    transformers.AutoModel.from_pretrained("alice/codec", trust_remote_code=False)
except ValueError as error:
    print("refused:", "trust_remote_code" in str(error))
"""
    done = clean_process(blocks["codec"] + blocks["student"] + more, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tensor(" in done.stdout and "Once upon a time" in done.stdout and "refused: True" in done.stdout


def test_what_lies_on_the_hub_is_the_model_and_nothing_else_of_the_folder(trained, hub):
    """`training_args.bin` is a pickle that holds this machine's paths; an adapter's folder is no part of the model."""
    assert push(trained / "student", "alice/student") == 0
    folder, source = hub.folder("alice/student"), trained / "student"
    there = {path.name for path in folder.iterdir()}
    assert (source / "training_args.bin").exists() and not there & {"training_args.bin", "trainer_state.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_latentforge.py"} <= there
    for name in ("model.safetensors", "config.json", "tokenizer.json", "modeling_token_loss.py"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    # weights went as large files, and no text holds a folder of this machine
    assert [path.read_bytes() for path in (hub.root / "lfs").iterdir()] == [
        (folder / "model.safetensors").read_bytes()
    ]
    assert all(str(trained) not in path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json"))


def test_a_space_shows_the_uploaded_model(trained, hub, capsys):
    """Without the variable it would look for a folder of the author's machine; caches are nobody's app."""
    for _ in range(2):  # made, then updated
        assert push(trained / "student", "alice/student", "--space", "alice/space") == 0
    assert "alice/student is shown at" in capsys.readouterr().out
    space = hub.repos["alice/space"]
    assert space.sdk == "gradio" and space.variables == {"LATENTFORGE_MODEL": "alice/student"}
    sent = {path.name for path in hub.folder("alice/space").iterdir()} - {".gitattributes"}
    assert sent == {"app.py", "requirements.txt", "README.md"}
    assert (hub.folder("alice/space") / "app.py").read_text() == (ROOT / "scripts/space/app.py").read_text()
    assert push(trained / "student", "alice/student", "--space", "bob/space") == 1
    assert "may not write" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        push(trained / "student", "alice/student", "--space", "space")
    assert "space (space) names no owner" in capsys.readouterr().err


def test_a_space_is_refused_to_a_model_that_it_cannot_show(trained, hub, tmp_path, capsys):
    """It would be built, and greet its visitors with an error."""
    save_wire(idea(), tmp_path / "idea")
    for model, message in ((trained / "codec", "shows students and idea models"), (tmp_path / "idea", "no reader")):
        assert push(model, "alice/model", "--space", "alice/space") == 1
        assert message in one_line(capsys) and not hub.requests
    save_wire(idea(receiver="alice/reader"), tmp_path / "idea")
    assert push(tmp_path / "idea", "alice/idea", "--space", "alice/space") == 0
    assert hub.repos["alice/space"].variables == {"LATENTFORGE_MODEL": "alice/idea"}


def test_a_wire_on_the_hub_has_the_adapters_of_its_receivers(hub, tmp_path, capsys):
    """Without its adapter a receiver is another model than the bridge learned for, and nothing says so."""
    made, options = wire(receivers=("llama", "gpt2")), {"max_new_tokens": 5, "do_sample": False}
    places = {}
    for name in ("llama", "gpt2"):
        bare = receiver(name)
        bare.model.save_pretrained(tmp_path / name)
        bare.tokenizer.save_pretrained(tmp_path / name)
        places[name] = str(tmp_path / name)
    plain = made.score("llama", made.encode(CONTEXTS), PROMPTS, ["a", "b", "c"])[0]
    add_adapter(made.receivers["llama"], r=2)
    for number, parameter in enumerate(adapter_parameters(made.receivers["llama"]).values()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    save_wire(made, tmp_path / "wire")
    (tmp_path / "wire" / "receivers" / "llama" / "optimizer.pt").write_bytes(b"a pickle")
    assert push(tmp_path / "wire", "alice/wire") == 0
    there = hub.folder("alice/wire") / "receivers"
    sent = sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file())
    assert sent == ["llama/adapter_config.json", "llama/adapter_model.safetensors"]
    again = load_wire(str(hub.folder("alice/wire")), places, device="cpu")
    for name in places:
        texts = [model.generate(name, model.encode(CONTEXTS), PROMPTS, **options) for model in (again, made)]
        assert texts[0] == texts[1]
    scores = [model.score("llama", model.encode(CONTEXTS), PROMPTS, ["a", "b", "c"])[0] for model in (again, made)]
    torch.testing.assert_close(*scores)
    assert not torch.allclose(scores[0], plain)

    (tmp_path / "wire" / "receivers" / "llama" / "adapter_model.safetensors").unlink()
    assert push(tmp_path / "wire", "alice/wire") == 1
    assert "the bridge 'llama' learned with this adapter" in one_line(capsys)
    shutil.rmtree(tmp_path / "wire" / "receivers")
    assert push(tmp_path / "wire", "alice/wire") == 0
    assert not (hub.folder("alice/wire") / "receivers").exists(), "a later wire would be loaded with an earlier LoRA"


@pytest.mark.slow
def test_a_wire_is_seen_to_load(hub, tmp_path, capsys):
    """A check that knows students only reports every wire as broken."""
    for name, model in (("wire", wire(receivers=("llama",))), ("idea", idea())):
        save_wire(model, tmp_path / name)
        assert push_to_hub.main(["--model", str(tmp_path / name), "--repo_id", f"alice/{name}"]) == 0
        assert f"loads in a clean process: {type(model).__name__}" in capsys.readouterr().out


def test_an_existing_repository_is_updated(trained, hub, tmp_path, capsys):
    """Shards that an earlier upload left beside new weights, or weights beside new shards, load as the wrong model."""
    model = shutil.copytree(trained / "student", tmp_path / "model")
    assert push(model, "alice/student") == 0
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    (model / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, model / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert push(model, "alice/student", "--commit_message", "two shards", "--license", "apache-2.0") == 0
    there = {path.name for path in hub.folder("alice/student").iterdir()}
    assert set(shards) <= there and "model.safetensors" not in there
    card = ModelCard.load(hub.folder("alice/student") / "README.md")
    assert card.data.license == "apache-2.0" and len(hub.repos["alice/student"].commits) == 3
    assert push(model, "alice/student", "--license", "apache-2.0") == 0  # nothing new: no commit
    assert len(hub.repos["alice/student"].commits) == 3
    # a shard that is lost
    (model / "model-00002-of-00002.safetensors").unlink()
    assert push(model, "alice/student") == 1 and "00002.safetensors is missing" in capsys.readouterr().err


def test_a_branch_gets_the_upload_and_main_does_not(trained, hub, capsys):
    """A trial that lands on main is what everybody loads."""
    assert push(trained / "codec", "alice/codec") == 0
    HfApi(endpoint=hub.url, token="hf_alicewrites").create_branch("alice/codec", branch="trial")
    before = hub.repos["alice/codec"].branches["main"]
    assert push(trained / "codec", "alice/codec", "--revision", "trial", "--license", "mpl-2.0") == 0
    branches = hub.repos["alice/codec"].branches
    assert branches["main"] == before != branches["trial"]
    assert ModelCard.load(hub.folder("alice/codec", "trial") / "README.md").data.license == "mpl-2.0"
    assert push(trained / "codec", "alice/codec", "--revision", "trail") == 1
    assert "has no branch 'trail'" in capsys.readouterr().err
    assert push(trained / "codec", "alice/new", "--revision", "trial") == 1
    assert "alice/new" not in hub.repos  # an empty repository would be left behind


def test_a_private_upload_is_private_or_does_not_happen(trained, hub, capsys, monkeypatch):
    """Weights are public for good once they were public for a minute."""
    assert push(trained / "codec", "alice/open") == 0 and not hub.repos["alice/open"].private
    assert push(trained / "codec", "alice/open", "--private") == 1
    assert "alice/open exists and is public" in capsys.readouterr().err
    assert len(hub.repos["alice/open"].commits) == 2
    assert push(trained / "codec", "alice/shut", "--private") == 0 and hub.repos["alice/shut"].private
    assert push(trained / "codec", "alice/shut", "--private") == 0
    monkeypatch.setenv("HF_TOKEN", "hf_bobwrites")
    capsys.readouterr()
    assert push(trained / "codec", "alice/shut", "--revision", "main") == 1
    assert "this token sees no repository alice/shut (404" in one_line(capsys)


def one_line(capsys: pytest.CaptureFixture) -> str:
    """What the script said in the end: one line, and no token in it."""
    said = capsys.readouterr()
    assert "Traceback" not in said.err and not [token for token in TOKENS if token in said.out + said.err]
    return said.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "alice/codec", "there is no token: run `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", "alice/codec", "does not accept the token (401, Invalid credentials"),
        ("hf_ümlaut", "alice/codec", "the token holds blanks or letters that no token has"),
        ("hf_aliceread", "alice/codec", "may not write to alice/codec (403"),
        ("hf_alicewrites", "bob/codec", "may not write to bob/codec (403"),
    ],
)
def test_a_token_that_may_not_is_told_so(trained, hub, capsys, monkeypatch, token, repo_id, message):
    """`403 Client Error` and a trace of thirty lines send people to the wrong settings page."""
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert push(trained / "codec", repo_id) == 1
    said = one_line(capsys)
    assert message in said and (token is None or token not in said) and not hub.repos


def test_a_login_of_the_hubs_own_tool_is_used(trained, hub, tmp_path, monkeypatch):
    """Whoever has logged in must not have to put a token into a shell's history."""
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_alicewrites\n")
    assert push(trained / "codec", "alice/codec") == 0


def test_a_hub_that_cannot_be_reached_is_named(trained, hub, capsys, monkeypatch):
    """A wrong proxy or HF_ENDPOINT shows only in the address."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert push(trained / "codec", "alice/codec") == 1
    assert "http://127.0.0.1:9 cannot be reached" in one_line(capsys)


def test_a_licence_that_the_hub_does_not_know_is_quoted_with_those_it_knows(trained, hub, capsys):
    """`Invalid metadata` alone says neither which nor what else."""
    assert push(trained / "codec", "alice/codec", "--license", "mitt") == 1
    said = one_line(capsys)
    assert '"license" must be one of apache-2.0, mit' in said and "--license" in said
    assert len(hub.repos["alice/codec"].commits) == 1


def test_a_hub_that_refuses_in_the_middle_is_quoted_and_nothing_is_committed(trained, hub, capsys):
    """Half an upload must not become a version that people load."""
    hub.broken = 507
    assert push(trained / "codec", "alice/codec") == 1
    assert "refused the upload of alice/codec (507, the store of large files is out of order)" in one_line(capsys)
    assert len(hub.repos["alice/codec"].commits) == 1


@pytest.mark.parametrize("repo_id", ["codec", "alice/co dec", "alice/co--dec", "alice/codec/main", "/codec"])
def test_an_id_that_is_none_is_refused_before_anything_is_sent(trained, hub, capsys, repo_id):
    """The Hub's own message for these is about something else."""
    with pytest.raises(SystemExit):
        push(trained / "codec", repo_id)
    said = one_line(capsys)
    assert repo_id in said and "owner/name" in said and not hub.requests


def cut(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def without_a_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights.pop("mask_embedding")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def edit(model: Path, **fields) -> None:
    before = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**before, **fields}))


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def without_code_names(model: Path) -> None:
    fields = json.loads((model / "config.json").read_text())
    del fields["auto_map"]
    (model / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "there is no folder"),
        (lambda model: (model / "config.json").unlink(), "holds no model, it has no config.json"),
        (lambda model: (model / "config.json").write_text("{"), "config.json cannot be used"),
        (lambda model: (model / "config.json").write_text("[]"), "config.json cannot be used"),
        (lambda model: edit(model, patch_size=0), "`patch_size` must be at least 1, got 0"),
        (lambda model: LlamaConfig().save_pretrained(model), "holds a 'llama' model, which is none of LatentForge's"),
        (lambda model: (model / "model.safetensors").unlink(), "must hold weights in safetensors and holds none"),
        (pickled, "only pickled ones (pytorch_model.bin)"),
        (cut, "bytes) is cut short or damaged"),
        (without_a_weight, "1 are missing (mask_embedding first)"),
        (lambda model: edit(model, hidden_size=64), "config.json asks for"),
        (lambda model: (model / "modeling_token_loss.py").unlink(), "modeling_token_loss.py is missing"),
        (lambda model: (model / "modeling_token_loss.py").write_text("<html>"), "modeling_token_loss.py is no Python"),
        (without_code_names, "names no code (auto_map)"),
        (lambda model: (model / "README.md").write_text("---\nlicense: [mit\n---\n"), "metadata of"),
    ],
)
def test_a_folder_that_would_not_load_is_refused_before_anything_is_sent(
    trained, hub, tmp_path, capsys, damage, message
):
    """What is found out by the first stranger is found out too late."""
    model = shutil.copytree(trained / "codec", tmp_path / "model")
    damage(model)
    assert push(model, "alice/codec") == 1
    assert message in one_line(capsys) and not hub.requests


@pytest.mark.parametrize(
    "parts",
    [
        {"head": "energy", "backbone": "qwen3"},
        {"decoder": "parallel", "train_decoder": True, "backbone": "gpt_neox"},
        {"decoder": "parallel"},
        {"tie_word_embeddings": True, "input_mode": "latents"},
    ],
)
def test_every_kind_of_student_passes_the_check(tmp_path, parts):
    """A check that knows one kind keeps the others from the Hub."""
    student = tiny_student(**parts)
    student.save_pretrained(tmp_path)
    checked = push_to_hub.check_folder(tmp_path)
    assert checked.num_parameters == student.num_parameters() and not checked.has_tokenizer
    assert set(checked.files) >= {path.name for path in tmp_path.glob("*.py")}


def test_a_missing_card_is_filled_from_the_folder(trained, hub, tmp_path, capsys):
    """A model without a card is a model that nobody can judge."""
    model = shutil.copytree(trained / "student", tmp_path / "model")
    (model / "README.md").unlink()
    assert push(model, "alice/student") == 0
    assert "README.md is missing: a card is filled" in capsys.readouterr().out
    card = ModelCard.load(hub.folder("alice/student") / "README.md")
    nll = json.loads((model / "eval_results.json").read_text())["eval_nll"]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["nll"] == pytest.approx(nll, abs=1e-6)
    assert 'repo_id = "alice/student"' in card.text and not (model / "README.md").exists()


@pytest.mark.slow
def test_an_upload_that_does_not_load_is_reported_as_such(trained, hub, tmp_path, capsys):
    """`uploaded` alone would be true, and worth nothing."""
    model = shutil.copytree(trained / "codec", tmp_path / "model")
    with open(model / "modeling_autoencoder.py", "a", encoding="utf-8") as file:
        file.write("\nraise RuntimeError('of an older version')\n")
    assert push_to_hub.main(["--model", str(model), "--repo_id", "alice/codec"]) == 1
    said = one_line(capsys)
    assert "alice/codec is uploaded but does not load in a clean process" in said and "older version" in said


@pytest.mark.slow
def test_an_adapter_finds_its_student_on_the_hub(trained, hub, tmp_path):
    """An adapter that names a folder, or whose student loads without its code, works for nobody but its author."""
    assert push(trained / "student", "alice/student") == 0
    code = """
import sys, torch, peft, transformers
from transformers import AutoModelForCausalLM
there = {"trust_remote_code": True}
ids = torch.arange(65, 77)[None]
def write(model):
    return model.eval().generate(ids, max_new_tokens=9, do_sample=False, output_logits=True,
                                 return_dict_in_generate=True)
base = AutoModelForCausalLM.from_pretrained("alice/student", **there)
plain = write(base).logits[0]
lora = peft.LoraConfig(r=2, target_modules=r"model\\.backbone\\..*\\.(q_proj|v_proj)", init_lora_weights=False)
adapted = peft.get_peft_model(base, lora)
expected = write(adapted)
assert not torch.equal(expected.logits[0], plain)
adapted.push_to_hub("alice/adapter")
adapted.save_pretrained("adapter")
found = {
    "peft": peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("alice/student", **there),
                                           "alice/adapter"),
    "auto, hub": AutoModelForCausalLM.from_pretrained("alice/adapter", **there),
    "auto, folder": AutoModelForCausalLM.from_pretrained("adapter", **there),
}
for name, model in found.items():
    made = write(model)
    assert torch.equal(made.sequences, expected.sequences), name
    torch.testing.assert_close(made.logits, expected.logits, rtol=0, atol=1e-5)
assert not any(name.startswith(("modeling_latentforge", "trainers")) for name in sys.modules)
"""
    done = clean_process(code, tmp_path)
    assert done.returncode == 0, done.stderr
    there = {path.name for path in hub.folder("alice/adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= there and "model.safetensors" not in there
    config = json.loads((hub.folder("alice/adapter") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "alice/student"
