"""Put a trained model on the Hugging Face Hub, a codec, student, wire or idea model: weights, code, tokenizer, card.

    python scripts/push_to_hub.py --model runs/demo/student --repo_id my-name/my-student --private
    python scripts/push_to_hub.py --model checkpoints/ae --repo_id my-name/my-codec --license apache-2.0
    python scripts/push_to_hub.py --model runs/demo/student --repo_id my-name/my-student --revision trial
    python scripts/push_to_hub.py --model runs/demo/student --repo_id my-name/my-student --space my-name/my-space

The folder is checked before anything is sent. A repository that exists is updated; `--revision` takes a branch that
exists. With a wire go the adapters of its receivers (`receivers/`), without which bridges speak to other models than
they learned for; receivers themselves stay where they are. `--space` makes or updates a Gradio Space that shows the
uploaded student or idea model (`scripts/space/`). The token is the
one of `hf auth login`, or HF_TOKEN. At the end a process that has nothing of ours loads the uploaded model by its id,
unless `--no_verify`. A card that is missing is filled from the folder; one that is there is sent with the repository's
id in its usage code.
"""

import ast
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


DEFAULT_ENDPOINT = "https://huggingface.co"
# what else of a folder goes to the Hub. A list of what may, not of what may not: optimizer states, logs and
# training_args.bin (a pickle with this machine's paths) lie there too
BESIDE = (
    "generation_config.json eval_results.json LICENSE* tokenizer* special_tokens_map.json added_tokens.json "
    "chat_template.jinja vocab.* merges.txt *.model"
).split()

# run in an empty folder without PYTHONPATH; an installation of ours needs its names blocked
CLEAN_LOAD = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_latentforge", "trainers", "scripts"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch, transformers
repo_id, revision, auto_class, tokenizer = sys.argv[1:]
where = {"revision": revision, "trust_remote_code": True}
model = getattr(transformers, auto_class).from_pretrained(repo_id, **where).eval()
if tokenizer:
    transformers.AutoTokenizer.from_pretrained(repo_id, **where)
config = model.config
wire = hasattr(config, "encoder_config")
ids = torch.arange(8 if wire else 2 * config.patch_size)[None]
with torch.no_grad():
    if wire:
        found = model(ids % config.encoder_config.vocab_size).last_hidden_state
    else:
        found = model(ids % config.vocab_size).logits
assert found.isfinite().all(), "what it makes of a text is not finite"
print(f"{type(model).__name__}, {model.num_parameters():,} parameters")
"""


@dataclass
class PushArguments:
    """What goes where."""

    model: str = field(metadata={"help": "Folder of a trained model."})
    repo_id: str = field(metadata={"help": "owner/name on the Hub; made if it does not exist."})
    private: bool = field(default=False, metadata={"help": "A new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "A branch that exists. Default: main."})
    commit_message: str = field(default="Upload model", metadata={"help": "Of the commit."})
    license: str | None = field(default=None, metadata={"help": "Licence to state in the card, of the Hub's list."})
    verify: bool = field(default=True, metadata={"help": "Load the result from the Hub in a clean process."})
    space: str | None = field(
        default=None,
        metadata={
            "help": "owner/name of a Gradio Space that shows the student or idea model; made if it is not there."
        },
    )

    def __post_init__(self) -> None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        for name in ("repo_id", "space"):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{name} ({value}) is no Hub id: {reason} Write it as owner/name.") from None
            if value.count("/") != 1:
                raise ValueError(f"{name} ({value}) names no owner: write it as owner/name.")
        if self.space is not None and self.revision is not None:
            raise ValueError(f"space ({self.space}) shows a model's main branch: drop revision ({self.revision}).")
        if not self.commit_message.strip():
            raise ValueError("commit_message is empty: say in a few words what the upload is.")


class PushError(RuntimeError):
    """What keeps a model from the Hub, in one line with its remedy."""


@dataclass
class Checked:
    """A folder that may go to the Hub: its configuration, and what is sent, by name."""

    folder: Path
    config: Any
    auto_class: str
    files: list[str]
    num_parameters: int

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer_config.json" in self.files


def check_folder(folder: Path) -> Checked:
    """See that a folder holds a whole LatentForge model that loads where nothing of ours is installed.

    Raises:
        PushError: it does not.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import modeling_latentforge  # noqa: F401  (registers our models with the Auto classes)
    from trainers.model_card import KINDS

    if not folder.is_dir():
        raise PushError(f"there is no folder {folder}: pass the --output_dir of a training.")
    if not (folder / "config.json").exists():
        raise PushError(
            f"{folder} holds no model, it has no config.json: pass the final folder of a training, not one above it."
        )
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = fields.get("model_type")
        config = AutoConfig.from_pretrained(folder) if model_type in KINDS else None
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = _line(error, last=True)
        raise PushError(f"{folder / 'config.json'} cannot be used ({reason}): save the model again.") from error
    if config is None:
        raise PushError(
            f"{folder} holds a {model_type!r} model, which is none of LatentForge's: push it with `hf upload`, say."
        )
    shapes, weights = read_weights(folder)
    check_complete(folder, config, shapes)
    code = remote_code(folder, fields.get("auto_map"))
    beside = sorted({path.name for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()})
    adapters = receivers_adapters(folder, config)
    auto_class = "AutoModelForCausalLM" if model_type == "latentforge" else "AutoModel"
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    return Checked(folder, config, auto_class, ["config.json", *weights, *code, *beside, *adapters], num_parameters)


def receivers_adapters(folder: Path, config: Any) -> list[str]:
    """The files of the adapters that a wire's bridges learned with, as `trainers.wire_models` lays them down.

    Raises:
        PushError: half of one is there.
    """
    from trainers.wire_lora import CONFIG, WEIGHTS
    from trainers.wire_models import ADAPTERS

    found: list[str] = []
    for name in getattr(config, "bridges", None) or ():
        if (folder / ADAPTERS / name).is_dir():
            for file in (CONFIG, WEIGHTS):
                path = folder / ADAPTERS / name / file
                if not path.is_file():
                    raise PushError(
                        f"{path} is missing, the bridge {name!r} learned with this adapter: copy it from where it was."
                    )
                found.append(f"{ADAPTERS}/{name}/{file}")
    return found


def check_space(checked: Checked) -> None:
    """See that a Space can show the model.

    Raises:
        PushError: it cannot.
    """
    if checked.config.model_type not in ("latentforge", "latentforge_idea"):
        raise PushError(
            f"a Space shows students and idea models, and {checked.folder} holds a {checked.config.model_type} model: "
            "drop --space."
        )
    if checked.config.model_type == "latentforge_idea" and checked.config.receiver is None:
        raise PushError(
            f"{checked.folder} was trained for a language model that is not on the Hub, and the Space would have no "
            "reader: drop --space."
        )


def read_weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes by name, and the files that hold them, from the headers of the safetensors.

    Raises:
        PushError: none, incomplete ones, or pickles.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        shards, files = ["model.safetensors"], ["model.safetensors"]
    elif index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, TypeError, KeyError) as error:
            raise PushError(f"{index} is no list of weights ({_line(error)}): copy or save it again.") from error
        files = [*shards, index.name]
    else:
        pickles = [path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model")]
        found = f"only pickled ones ({pickles[0]}), which run code when they are read" if pickles else "none"
        raise PushError(f"{folder} must hold weights in safetensors and holds {found}: save it with save_pretrained.")
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except FileNotFoundError:
            raise PushError(
                f"{folder / shard} is missing, {index.name} names it: copy it from where it was."
            ) from None
        except (SafetensorError, OSError) as error:
            size = (folder / shard).stat().st_size
            raise PushError(
                f"{folder / shard} ({size:,} bytes) is cut short or damaged ({_line(error)}): copy or save it again."
            ) from error
    return shapes, files


def check_complete(folder: Path, config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with the model that the configuration describes.

    Raises:
        PushError: weights that are missing, too many or of another shape.
    """
    import torch
    from transformers import AutoModel

    with torch.device("meta"):  # shapes only
        model = AutoModel.from_config(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = sorted(set(expected) - set(shapes) - set(model.all_tied_weights_keys))
    unknown = sorted(set(shapes) - set(expected))
    wrong = [name for name in shapes if name in expected and shapes[name] != expected[name]]
    if missing or unknown:
        which = [
            f"{len(names)} are {what} ({names[0]} first)"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise PushError(
            f"the weights in {folder} are not those of its config.json, {' and '.join(which)}: checkpoints of a LoRA "
            "run are such, push the final folder."
        )
    if wrong:
        raise PushError(
            f"{wrong[0]} in {folder} has the shape {shapes[wrong[0]]}, config.json asks for {expected[wrong[0]]}: "
            "save model and configuration together."
        )


def remote_code(folder: Path, auto_map: Any) -> list[str]:
    """The Python files that a loader without our packages needs, found from `auto_map` on.

    Raises:
        PushError: one is missing or damaged.
    """
    remedy = "save it again with `from_pretrained` and `save_pretrained` of this version"
    references = [reference for reference in (auto_map or {}).values() if isinstance(reference, str)]
    if not references:
        raise PushError(f"config.json in {folder} names no code (auto_map), it would load nowhere else: {remedy}.")
    waiting = sorted({reference.rpartition("--")[2].partition(".")[0] for reference in references})
    found: list[str] = []
    for module in waiting:  # grows while it is read
        path = folder / f"{module}.py"
        if not path.exists():
            raise PushError(f"the model's code {path} is missing, it would load nowhere else: {remedy}.")
        found.append(path.name)
        try:
            waiting += [name for name in _siblings(path) if name not in waiting]
        except (SyntaxError, ValueError) as error:
            raise PushError(f"the model's code {path} is no Python ({_line(error)}): {remedy}.") from error
    return sorted(found)


def _siblings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            yield node.module.partition(".")[0]


def make_card(checked: Checked, repo_id: str, license: str | None) -> str:
    """The text of the card as it goes to the Hub.

    Raises:
        PushError: the card in the folder has metadata that does not parse.
    """
    import yaml
    from huggingface_hub import ModelCard

    from trainers.model_card import address_card, card_of_folder

    path = checked.folder / "README.md"
    try:
        if path.exists():
            card = address_card(ModelCard.load(path), repo_id, license)
        else:
            print(f"{path} is missing: a card is filled from what the folder holds")
            card = card_of_folder(checked.folder, checked.config, repo_id, checked.num_parameters, license)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise PushError(f"the metadata of {path} do not parse ({_line(error)}): mend or delete it.") from error
    if card.data.license in (None, "unknown"):
        print("the card states no licence: nobody may use the model by that, --license names one")
    return str(card)


def check_token(token: str | None) -> None:
    """See that there is a token, and that it can be sent.

    Raises:
        PushError: it cannot; the message does not quote it.
    """
    if token is None:
        raise PushError("there is no token: run `hf auth login`, or set HF_TOKEN to one with write access.")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise PushError("the token holds blanks or letters that no token has: copy it anew to `hf auth login`.")


def push(arguments: PushArguments, checked: Checked, card: str, token: str | None) -> tuple[str, str]:
    """Create the repository where there is none, and send all files in one commit.

    Returns:
        The commit's id and address.

    Raises:
        PushError: a public repository where a private one was asked for, or a card that the Hub refuses.
        huggingface_hub's: see `explain`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=endpoint(), token=token)
    branch = {"repo_id": arguments.repo_id, "revision": arguments.revision}
    if arguments.revision is None:
        # a branch other than main exists in no new repository: then none is made before that is found out
        api.create_repo(arguments.repo_id, private=arguments.private or None, exist_ok=True)
    info = api.repo_info(**branch)
    if arguments.private and not info.private:
        raise PushError(
            f"{arguments.repo_id} exists and is public, --private is for new repositories: make it private in its "
            "settings first, or drop --private."
        )
    contents: dict[str, Any] = {name: checked.folder / name for name in checked.files}
    contents["README.md"] = card.encode()
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    # a loader prefers model.safetensors to shards, and takes every adapter: what an earlier upload left would win
    stale = [name for name in api.list_repo_files(**branch) if _is_weights(name) and name not in checked.files]
    operations += [CommitOperationDelete(name) for name in stale]
    try:
        commit = api.create_commit(operations=operations, commit_message=arguments.commit_message, **branch)
    except ValueError as error:
        if isinstance(error, HfHubHTTPError):
            raise
        # the Hub reads the card first, and knows what may stand in it
        raise PushError(
            f"the Hub does not take the card of {arguments.model} ({_line(error, last=True)[:300]}): mend its "
            "README.md, or pass another --license."
        ) from error
    return commit.oid, commit.commit_url


def push_space(arguments: PushArguments, token: str | None) -> str:
    """Send `scripts/space/` to a Space and tell it which model to show; returns its address."""
    from huggingface_hub import HfApi

    assert arguments.space is not None
    api = HfApi(endpoint=endpoint(), token=token)
    space = {"repo_id": arguments.space, "repo_type": "space"}
    api.create_repo(**space, space_sdk="gradio", private=arguments.private or None, exist_ok=True)
    # before the files: they make it build
    api.add_space_variable(arguments.space, "LATENTFORGE_MODEL", arguments.repo_id)
    api.upload_folder(
        **space,
        folder_path=Path(__file__).resolve().parent / "space",
        allow_patterns=["app.py", "requirements.txt", "README.md"],
        commit_message=f"Show {arguments.repo_id}",
    )
    return f"{endpoint()}/spaces/{arguments.space}"


def _is_weights(name: str) -> bool:
    from trainers.wire_models import ADAPTERS

    own = "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
    return own or name.startswith(f"{ADAPTERS}/")


def verify(arguments: PushArguments, checked: Checked, revision: str, token: str | None) -> str:
    """Download the commit into an empty cache and run it where nothing of ours can be imported; returns what loaded.

    Raises:
        PushError: it does not load there.
    """
    with tempfile.TemporaryDirectory(prefix="latentforge-verify-") as empty:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "HF_TOKEN": token or "",  # not an argument: a command line is open to every user of the machine
            "HF_HUB_CACHE": f"{empty}/hub",
            "HF_MODULES_CACHE": f"{empty}/modules",
        }
        arguments_of_code = [arguments.repo_id, revision, checked.auto_class, "yes" if checked.has_tokenizer else ""]
        done = subprocess.run(
            [sys.executable, "-c", CLEAN_LOAD, *arguments_of_code],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise PushError(
            f"{arguments.repo_id} is uploaded but does not load in a clean process ({_line(done.stderr, last=True)}): "
            "mend that and push again, it updates the repository."
        )
    return done.stdout.strip()


def endpoint() -> str:
    """The Hub's address."""
    return os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")


def explain(error: Exception, arguments: PushArguments) -> str | None:
    """One line about a failure of the Hub's or of the way there, with the remedy; None for any other error."""
    from huggingface_hub import errors

    if isinstance(error, PushError):
        return str(error)
    repo_id, hub = arguments.repo_id, endpoint()
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"the Hub is switched off (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')}): unset HF_HUB_OFFLINE."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch {arguments.revision!r}: create it on the Hub first, or drop --revision."
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = _line(error.server_message or "no reason given")
        if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{hub} does not accept the token (401, {said}): make one with write access in your settings there, "
                "and log in with `hf auth login`."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"this token sees no repository {repo_id} ({status}, {said}): it is private or does not exist. Ask "
                "its owner for access, or drop --revision to make a new one."
            )
        if status == 403:
            return (
                f"this token may not write to {repo_id} (403, {said}): take one with write access, or a --repo_id of "
                "an owner that is you."
            )
        return f"{hub} refused the upload of {repo_id} ({status}, {said}): what it says must be mended, or try later."
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        return f"{hub} cannot be reached ({_line(error)}): check the network, the proxy and HF_ENDPOINT."
    if isinstance(error, OSError):
        return f"the upload of {repo_id} broke off ({_line(error)}): push again, what has arrived is not sent twice."
    cause = error.__cause__
    if isinstance(cause, Exception):  # uploads run in threads, which wrap what went wrong
        return explain(cause, arguments)
    return None


def _line(message: Any, last: bool = False) -> str:
    lines = [line.strip() for line in str(message).splitlines() if line.strip()] or [type(message).__name__]
    return lines[-1 if last else 0].rstrip(".:")


def main(argv: Sequence[str] | None = None) -> int:
    from trainers.arguments import parse_arguments

    (arguments,) = parse_arguments(PushArguments, argv=argv, description=__doc__)

    from huggingface_hub import get_token

    token = get_token()
    try:
        checked = check_folder(Path(arguments.model))
        if arguments.space is not None:
            check_space(checked)
        card = make_card(checked, arguments.repo_id, arguments.license)
        check_token(token)
        commit, address = push(arguments, checked, card, token)
        print(f"{len(checked.files) + 1} files of {arguments.model} are at {address}")
        if arguments.verify:
            print(f"loads in a clean process: {verify(arguments, checked, commit, token)}")
        if arguments.space is not None:
            print(f"{arguments.repo_id} is shown at {push_space(arguments, token)}")
            if arguments.private:
                print("the model is private: give the Space a secret HF_TOKEN that may read it")
    except Exception as error:
        message = explain(error, arguments)
        if message is None:
            raise
        # some libraries quote the header that they could not send
        print(message.replace(token, "[token]") if token else message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    from trainers.command_line import run

    run(main, returns_status=True)
