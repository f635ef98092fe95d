"""Cards of really trained models; what they say must be what was recorded."""

import re
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from setuptools import build_meta
from transformers import LlamaConfig

from tests.conftest import tiny_autoencoder, tiny_student
from tests.trainers.training_helpers import byte_tokenizer, ragged_rows, tiny_args, tiny_teacher
from trainers import AEConfig, AETrainer, DataArguments, KDConfig, KDTrainer, PatchCollator
from trainers.model_card import (
    CardFacts,
    card_of_folder,
    describe_data,
    fill_card,
    license_of,
    public_name,
)
from trainers.teachers import HFTeacher


ROOT = Path(__file__).resolve().parent.parent.parent


def distilled(tmp_path, **kwargs) -> KDTrainer:
    """A student that a teacher from a folder has taught for a step."""
    tiny_teacher().save_pretrained(tmp_path / "secret" / "teacher")
    trainer = KDTrainer(
        tiny_student(**kwargs),
        tiny_args(KDConfig, tmp_path / "student", max_steps=1),
        teacher=HFTeacher(str(tmp_path / "secret" / "teacher")),
        train_dataset=ragged_rows(4),
        eval_dataset=ragged_rows(2),
        data_collator=PatchCollator(4),
        processing_class=byte_tokenizer(),
    )
    trainer.teacher_callback.close_after_training = False
    trainer.train()
    return trainer


def test_a_students_card_holds_what_its_run_measured(tmp_path):
    """A figure in a card that no evaluation gave is a claim; one of an earlier evaluation is a wrong one."""
    trainer = distilled(tmp_path)
    metrics = trainer.evaluate()
    trainer.create_model_card(**describe_data(DataArguments(data="owner/texts", split="train")))
    card = ModelCard.load(tmp_path / "student" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"latentforge", "custom_code"} <= set(data["tags"]) and data["datasets"] == ["owner/texts"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: pytest.approx(metrics[f"eval_{name}"], abs=1e-6) for name in ("nll", "kd")}
    assert "| steps | 1 |" in card.text and "| tokens per row | 16 |" in card.text
    assert "| temperature T of the distillation | 1 |" in card.text
    assert "Hub dataset owner/texts (split train)" in card.text and "distributions of a teacher" in card.text
    assert "1503.02531" in card.text and f"{trainer.model.num_parameters():,} parameters" in card.text
    assert str(ModelCard(str(card))) == str(card)


def test_a_card_names_no_folder_of_this_machine(tmp_path):
    """A path tells strangers a user's name, and helps none of them."""
    (tmp_path / "secret" / "corpus.jsonl").parent.mkdir()
    (tmp_path / "secret" / "corpus.jsonl").touch()
    trainer = distilled(tmp_path)
    trainer.create_model_card(
        finetuned_from=str(tmp_path / "secret" / "teacher"),
        **describe_data(DataArguments(data=str(tmp_path / "secret" / "corpus.jsonl"))),
    )
    text = (tmp_path / "student" / "README.md").read_text()
    assert str(tmp_path) not in text and "secret" not in text
    assert "(corpus.jsonl)" in text and "(teacher)" in text and "base_model" not in text and "datasets:" not in text


def test_a_later_card_forgets_nothing_that_an_earlier_was_told(tmp_path):
    """`push_to_hub` writes the card anew, and knows neither text nor teacher's layers."""
    trainer = distilled(tmp_path)
    trainer.create_model_card(dataset="letters of a lighthouse keeper", finetuned_from="owner/big-lm", license="mit")
    trainer.create_model_card(model_name="anything", tags=["tide"])
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert "lighthouse" in card.text and card.data.base_model == ["owner/big-lm"] and card.data.license == "mit"
    assert "tide" in card.data.tags


def test_a_codecs_card_names_the_noise_of_its_figures(tmp_path):
    """98 % right without noise and 98 % right under noise are two codecs."""
    trainer = AETrainer(
        tiny_autoencoder(),
        tiny_args(AEConfig, tmp_path, eval_noise=[0.5]),
        eval_dataset=ragged_rows(2),
        data_collator=PatchCollator(4),
    )
    metrics = trainer.evaluate()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "feature-extraction" and card.data.license == "mit"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert set(results) == {"nll"} | {f"{x}_accuracy{n}" for x in ("token", "patch") for n in ("", "_noise0.5")}
    noisy = results["token_accuracy_noise0.5"]
    assert noisy.metric_value == pytest.approx(metrics["eval_token_accuracy_noise0.5"], abs=1e-6)
    assert "standard deviation 0.5" in noisy.metric_name
    assert "AutoTokenizer" not in card.text  # none lies beside it
    assert "1503.02531" not in card.text


def test_a_licence_is_the_teachers_or_unknown_but_never_made_up(tmp_path):
    """MIT on a model that learned from one with other terms is a promise that nobody may make."""
    trainer = distilled(tmp_path)
    readme = tmp_path / "student" / "README.md"
    trainer.create_model_card()
    assert ModelCard.load(readme).data.license == "unknown" and "licence is not known" in readme.read_text()
    (tmp_path / "secret" / "teacher" / "README.md").write_text("---\nlicense: llama3.2\n---\n# A teacher\n")
    trainer.create_model_card()
    assert ModelCard.load(readme).data.license == "llama3.2" and "licence is not known" not in readme.read_text()
    (tmp_path / "secret" / "teacher" / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert license_of(str(tmp_path / "secret" / "teacher")) is None


@pytest.mark.parametrize(
    ("head", "decoder", "says", "not_said"),
    [
        ("energy", "autoregressive", "centre of that noise", "drawn independently"),
        ("regression", "parallel", "drawn independently", "centre of that noise"),
    ],
)
def test_limits_are_those_of_the_parts(head, decoder, says, not_said):
    """A likelihood of independent tokens beside one of a causal decoder must not look alike."""
    text = fill_card(tiny_student(head, decoder).config, CardFacts("owner/name", metrics={"nll": 1.0})).text
    assert says in text and not_said not in text and "trust_remote_code=True" in text.split("## Limits")[1]


def test_what_was_not_recorded_is_not_stated(tmp_path):
    """An empty table reads as a zero, a default as a measurement."""
    config = tiny_student().config
    card = card_of_folder(tmp_path, config, "owner/name")
    assert "No figure was recorded" in card.text and "Not recorded" in card.text and "|---|" not in card.text
    assert card.data.eval_results is None and card.data.license == "unknown" and "parameters" not in card.text
    (tmp_path / "eval_results.json").write_text('{"eval_nll": NaN, "eval_kd": 0.25, "eval_runtime": 3.0}')
    card = card_of_folder(tmp_path, config, "owner/name")
    assert [result.metric_type for result in card.data.eval_results] == ["kd"]
    assert "| nan |" in card.text and "3.0" not in str(card.data)


def test_the_text_is_named_as_what_it_is(tmp_path, monkeypatch):
    """A local folder called like a Hub data set is not that data set."""
    monkeypatch.chdir(tmp_path)
    assert describe_data(DataArguments(data="owner/texts"))["dataset_tags"] == "owner/texts"
    (tmp_path / "owner" / "texts").mkdir(parents=True)
    described = describe_data(DataArguments(data="owner/texts", eval_data="owner/judged", eval_split="test"))
    assert described["dataset_tags"] is None and described["dataset"] == "text that is not on the Hub (texts)"
    assert described["dataset_args"] == "the Hub dataset owner/judged (split test)"
    assert "standard library" in describe_data(DataArguments())["dataset"]
    assert public_name("owner/name") == "owner/name" and public_name("/a/b/c") == "a model that is not on the Hub (c)"


def test_other_models_have_no_card_here():
    """A Llama under the title of a codec would be believed."""
    with pytest.raises(ValueError, match="no card for a 'llama' model"):
        fill_card(LlamaConfig(), CardFacts("owner/name"))


def test_the_templates_are_in_the_installed_package(tmp_path, monkeypatch):
    """From a wheel, training would end in `template not found`, hours after it began."""
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for path in [*ROOT.glob("trainers/**/*.py"), *ROOT.glob("model_cards/*")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    names = zipfile.ZipFile(tmp_path / build_meta.build_wheel(str(tmp_path))).namelist()
    assert {f"model_cards/{path.name}" for path in ROOT.glob("model_cards/*.j2")} < set(names)
    assert {"trainers/model_card.py", "trainers/losses/__init__.py"} < set(names)
    # no code beyond the packages
    assert not [name for name in names if re.match(r"(tests|scripts|build|docs)/", name)]
