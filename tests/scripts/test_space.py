"""The Space in a real browser, as a visitor uses it."""

import html
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_student
from tests.modeling_latentforge.test_idea import idea
from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher
from trainers.evaluation.serving_load import free_port
from trainers.wire_lora import adapter_parameters, add_adapter
from trainers.wire_models import load_wire, save_wire


ROOT = Path(__file__).resolve().parent.parent.parent
APP = ROOT / "scripts" / "space" / "app.py"
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in (
        ("four", tiny_student()),
        ("three", tiny_student("energy", "parallel", patch_size=3)),
        ("teacher", tiny_teacher()),
    ):
        model.generation_config.eos_token_id = None
        model.config.eos_token_id = None
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    thinker = idea(steps=2)
    reader = thinker.receivers["gpt2"]
    reader.model.save_pretrained(folder / "reader")
    reader.tokenizer.save_pretrained(folder / "reader")
    add_adapter(reader, 2)
    with torch.no_grad():
        for parameter in adapter_parameters(reader).values():
            parameter.normal_()  # loud: without it a reader says something else
    save_wire(thinker, folder / "ideas")
    return folder


@pytest.fixture(scope="module")
def space(models, tmp_path_factory):
    """The app in a process of its own that has no LatentForge but the models' own code."""
    pytest.importorskip("gradio", reason="the extra `space` is not installed")
    folder, port = tmp_path_factory.mktemp("space"), free_port()
    shutil.copy(APP, folder)
    blocked = "import sys; sys.modules['modeling_latentforge'] = None; import runpy; sys.argv = ['app.py']; "
    environment = {
        **os.environ,
        "LATENTFORGE_MODEL": f"{models}/four {models}/three {models}/ideas",
        "LATENTFORGE_RECEIVER": f"{models}/reader",
        "LATENTFORGE_TEACHER": f"{models}/teacher",
        "PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HOME": str(folder / "home"),
    }
    environment.pop("LATENTFORGE_ANY_MODEL", None)
    with (folder / "log").open("w") as log:
        code = blocked + "runpy.run_path('app.py', run_name='__main__')"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
    yield url
    process.kill()
    process.wait()


@pytest.fixture
def page(space, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(60_000)
        sync_api.expect.set_options(timeout=60_000)
        page.goto(space)
        yield page
        page.screenshot(path=os.environ.get("SPACE_SCREENSHOT", str(tmp_path / "space.png")))
        browser.close()


def test_visitor_types_watches_patches_and_changes_the_model(page):
    """What the page promises: text patch by patch, each step visible, speeds, latents, another K."""
    from playwright.sync_api import expect

    expect(page.locator("#facts")).to_contain_text("K = 4 tokens per step")
    page.locator("#prompt textarea").fill("import <os>")
    count = page.locator("#count input[type=number]")
    count.fill("400")
    count.press("Tab")
    page.locator("#write").click()
    patches = page.locator("#text .patch")
    seen = set()
    while "tokens per step" not in (page.locator("#told").text_content() or ""):
        time.sleep(0.02)
    while "teacher" not in (page.locator("#told").text_content() or ""):
        seen.add(patches.count())
        time.sleep(0.02)
    assert len(seen) > 3, f"the text came whole: {sorted(seen)}"
    expect(page.locator("#text .prompt")).to_have_text("import <os>")
    assert patches.count() > 50
    assert len({patches.nth(i).get_attribute("style") for i in range(6)}) == 6, "a colour for each step"
    expect(page.locator("#told")).to_contain_text("400 tokens in")
    expect(page.locator("#told")).to_contain_text("the teacher writes")
    expect(page.locator("#latents img")).to_be_visible()

    page.locator("#model input").click()
    page.get_by_role("option").nth(1).click()
    expect(page.locator("#facts")).to_contain_text("K = 3 tokens per step")
    count.fill("12")
    count.press("Tab")
    page.locator("#write").click()
    expect(page.locator("#told")).to_contain_text("12 tokens in")

    page.get_by_role("tab", name="Codec").click()
    page.locator("#original textarea").fill("abc <b>")
    page.locator("#reconstruct").click()
    expect(page.locator("#exactness")).to_contain_text("7 tokens in 3 latents")
    assert page.locator("#again span").count() == 7


def test_a_visitor_cannot_load_what_the_space_does_not_offer(space):
    """Its code would run on the owner's machine."""
    from gradio_client import Client

    client = Client(space, verbose=False)
    with pytest.raises(Exception, match="not in the list of choices|This Space offers"):
        client.predict("somebody/evil", "x", 4, 0.0, 1.0, 0, 1, api_name="/write")
    text, told, _ = client.predict(_first(client), "x", 4, 0.0, 1.0, 0, 1, api_name="/write")
    assert "4 tokens in" in told and "<script" not in text


def texts_of(written):
    """Of every line, without its mark."""
    rows = re.findall(r'<div class="read[^"]*"><span class="mark"[^>]*>(.*?)</span>(.*?)</div>', written, re.DOTALL)
    return [(mark, html.unescape(text)) for mark, text in rows]


def test_a_visitor_sees_what_an_idea_model_thinks(space, models):
    """A strip or a step that another model's ideas were read for shows nothing of this one."""
    from gradio_client import Client

    client, name = Client(space, verbose=False), str(models / "ideas")
    thinker = load_wire(name, {"gpt2": str(models / "reader")}, device="cpu")
    for kind in ("linear", "slerp"):
        strip = texts_of(client.predict(name, "One <b>", "Another", kind, 6, api_name="/between"))
        assert [mark for mark, _ in strip] == [f"{place / 10:.1f}" for place in range(11)]
        ends = thinker.generate_batch(["One <b>", "Another"], max_new_tokens=6)
        middle = thinker.interpolate_and_generate("One <b>", "Another", 0.3, kind, max_new_tokens=6)
        assert [strip[0][1], strip[-1][1], strip[3][1]] == [*ends, middle]
    read = texts_of(client.predict(name, "One", 3, 6, api_name="/think"))
    said = [thinker.generate("One", steps=steps, max_new_tokens=6) for steps in range(4)]
    assert read == [(f"step {number}", text) for number, text in enumerate(said)]
    plot = client.predict(name, "one\n\ntwo\nthree $x$", 1, api_name="/where")
    assert plot["type"] == "matplotlib" and plot["plot"]


def test_a_wrong_model_or_text_is_told_to_the_visitor(space, models):
    """`Error` alone sends a visitor away."""
    from gradio_client import Client

    client, name = Client(space, verbose=False), str(models / "ideas")
    for message, endpoint, *values in (
        ("is no idea model", "/between", str(models / "four"), "one", "two", "linear", 6),
        ("is no student", "/write", name, "x", 4, 0.0, 1.0, 0, 1),
        ("There is an empty text", "/between", name, "one", " ", "linear", 6),
        ("There is an empty text", "/think", name, "", 2, 6),
        ("There is an empty text", "/where", name, "\n", 2),
        ("A map needs three ideas", "/where", name, "one\ntwo", 0),
        ("the encoder reads 8192", "/think", name, "x" * 9000, 2, 6),
        ("at most 20000 are taken", "/think", name, "x" * 20001, 2, 6),
        ("at most 64 are taken", "/where", name, "x\n" * 65, 2),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(*values, api_name=endpoint)
    assert texts_of(client.predict(name, "One", 0, 4, api_name="/think")), "the model still thinks"


def _first(client):
    models = [c for c in client.config["components"] if c["type"] == "dropdown"]
    return models[0]["props"]["value"]
