import copy
import logging
import pickle

import pytest

from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher
from trainers.teachers import Secret, build_teacher, read_env
from trainers.teachers.env import check_url


KEY = "sk-do-not-print-0123456789"


def test_env_file_is_read_as_people_write_it(tmp_path):
    """The old README's own lines have comments behind values; a key with one would be refused by the server."""
    (tmp_path / ".env").write_text(
        "# a comment\n\nTEACHER_BACKEND=venice\nexport VENICE_MODEL='a b'  # why\n"
        "VLLM_QUANTIZATION=gptq           # or awq\n"
        'VENICE_API_KEY="with # inside"\nVLLM_REMOTE_API_KEY=              # Optional\nVLLM_LOCAL_MODEL=a/b#c\n'
    )
    assert read_env(tmp_path / ".env", {}) == {
        "TEACHER_BACKEND": "venice",
        "VENICE_MODEL": "a b",
        "VLLM_QUANTIZATION": "gptq",
        "VENICE_API_KEY": "with # inside",
        "VLLM_LOCAL_MODEL": "a/b#c",
    }


def test_the_environment_wins_over_the_file(tmp_path):
    """A key for one run should not need an edit."""
    (tmp_path / ".env").write_text("VENICE_MODEL=a\nVENICE_API_KEY=file\n")
    values = read_env(tmp_path / ".env", {"VENICE_API_KEY": "shell"})
    assert values == {"VENICE_MODEL": "a", "VENICE_API_KEY": "shell"}
    assert read_env(tmp_path / "none", {}) == {}


def test_a_broken_line_is_named_by_its_number_and_not_shown(tmp_path):
    """The line that somebody pasted wrongly is most likely the key."""
    (tmp_path / ".env").write_text(f"A=1\n{KEY}\n")
    with pytest.raises(ValueError, match=r"\.env, line 2: expected NAME=value") as error:
        read_env(tmp_path / ".env", {})
    assert KEY not in str(error.value)


def test_a_secret_shows_itself_nowhere():
    """A key in a log file or an error report is a key that must be replaced."""
    secret = Secret(KEY, "VENICE_API_KEY")
    for text in (repr(secret), str(secret), f"{secret}", f"{[secret]}", repr({"key": secret})):
        assert KEY not in text and "VENICE_API_KEY" in text
    assert secret.redact(f"Invalid key {KEY}!") == "Invalid key ***!"
    assert secret and not Secret("", "X") and not Secret(None, "X")
    assert Secret("", "X").redact("words") == "words" and Secret("EMPTY", "X").redact("EMPTY words") == "EMPTY words"
    for keep in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            keep(secret)


@pytest.mark.parametrize("key", ["sk-0123\n456789", "sk-0123\u2026456789"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key):
    """Copied with a line break, it was the server that gave no answer, for ten minutes; and debug logs held it."""
    with pytest.raises(ValueError, match="VENICE_API_KEY holds a line break") as caught:
        Secret(key, "VENICE_API_KEY")
    assert "456789" not in str(caught.value)


def test_an_address_with_a_key_inside_is_refused_without_showing_it():
    """Addresses are printed and logged."""
    for url in (f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}"):
        with pytest.raises(ValueError, match="VLLM_REMOTE_URL holds a user") as error:
            check_url(url, "VLLM_REMOTE_URL")
        assert KEY not in str(error.value)
    with pytest.raises(ValueError, match="must be an address like"):
        check_url("10.0.0.5:8000", "VLLM_REMOTE_URL")
    assert check_url("http://10.0.0.5:8000/v1/", "X") == "http://10.0.0.5:8000/v1"


@pytest.mark.parametrize(
    ("backend", "environment", "kwargs", "message"),
    [
        ("gpt", {}, {}, "no teacher backend 'gpt'.*hf, vllm-local, vllm-remote, venice, openai, tgi"),
        ("hf", {}, {}, "needs --teacher"),
        ("vllm-remote", {}, {}, "needs VLLM_REMOTE_URL"),
        ("venice", {}, {}, "needs VENICE_API_KEY"),
        ("openai", {"OPENAI_API_KEY": KEY}, {}, "needs OPENAI_BASE_URL"),
        ("tgi", {}, {}, "needs TGI_URL"),
        (
            "venice",
            {},
            {"mode": "score"},
            "'venice' cannot score: it writes its own text only.*hf, vllm-local, vllm-remote",
        ),
        ("tgi", {}, {"mode": "score"}, "'tgi' cannot score"),
        ("vllm-remote", {}, {"mode": "sample"}, "cannot sample: it scores given text only.*venice, openai, tgi"),
    ],
)
def test_what_a_backend_lacks_or_cannot_do_is_said_before_anything_starts(backend, environment, kwargs, message):
    """A mode that is silently replaced trains on something else than was asked for."""
    with pytest.raises(ValueError, match=message):
        build_teacher(backend, byte_tokenizer(), environment, **kwargs)


def test_the_local_backend_is_the_hf_teacher(tmp_path):
    """The default must keep working without any of the others' packages."""
    tiny_teacher().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    teacher = build_teacher("hf", byte_tokenizer(), {}, str(tmp_path), vocab_size=258)
    teacher.check()
    with pytest.raises(ValueError, match="300 token ids and the teacher 258"):
        build_teacher("hf", byte_tokenizer(), {}, str(tmp_path), vocab_size=300)


def test_vllm_in_process_says_what_it_needs():
    """ModuleNotFoundError: vllm, after the data was prepared, sends people to the wrong environment."""
    try:
        import vllm  # noqa: F401

        pytest.skip("vLLM is installed here")
    except ImportError:
        pass
    with pytest.raises(ImportError, match="make setup-vllm"):
        build_teacher("vllm-local", byte_tokenizer(), {"VLLM_LOCAL_MODEL": "x"})


def test_no_key_reaches_logs_errors_or_reprs(caplog, capsys):
    """One grep over all that a failing and a working run say, the loggers of the HTTP packages at DEBUG included."""
    pytest.importorskip("openai")
    from tests.trainers.teacher_doubles import FakeVenice
    from trainers.evaluation.loopback_servers import FakeVLLM

    caplog.set_level(logging.DEBUG)
    said = []
    model, tokenizer = tiny_teacher(), byte_tokenizer()
    with (
        FakeVLLM(model, tokenizer, key="another") as vllm,
        FakeVenice(model, tokenizer, key="another") as venice,
    ):
        remote = {"VLLM_REMOTE_URL": f"{vllm.url}/v1", "VLLM_REMOTE_API_KEY": KEY}
        chat = {"VENICE_BASE_URL": f"{venice.url}/api/v1", "VENICE_API_KEY": KEY, "VENICE_MODEL": "teacher"}
        for backend, environment in (("vllm-remote", remote), ("venice", chat)):
            with pytest.raises(ValueError, match=r"answers 401.*\*\*\*") as error:
                build_teacher(backend, tokenizer, environment)
            said += [str(error.value), repr(error.value), repr(error.getrepr(style="short"))]
        vllm.key = venice.key = KEY
        teacher = build_teacher("vllm-remote", tokenizer, remote)
        writer = build_teacher("venice", tokenizer, chat, max_tokens=4)
        vllm.fault = lambda number: (500, {})
        teacher.server.flow.config = type(teacher.server.flow.config)(patience=0.3)
        with pytest.raises(ConnectionError) as error:
            teacher.check()
        said += [str(error.value), repr(teacher), repr(writer), repr(teacher.server), str(writer.describe())]
        assert any(KEY in str(headers) for *_, headers in vllm.requests + venice.requests), "it was really sent"
        teacher.close()
        writer.close()
    output = capsys.readouterr()
    for text in (*said, caplog.text, output.out, output.err):
        assert KEY not in text


@pytest.mark.parametrize("before", range(260, 301, 4))
def test_a_complaint_that_is_cut_holds_no_half_of_a_key(before):
    """Cut to its length first and searched for the key then, a long complaint ended in all but the key's last
    characters."""
    pytest.importorskip("openai")
    from trainers.evaluation.loopback_servers import LoopbackServer
    from trainers.teachers.flow import FlowConfig
    from trainers.teachers.http_server import HTTPServer, RequestRefused

    class Complaining(LoopbackServer):
        def answer(self, method, path, body, headers):
            return 401, {}, {"error": f"{'x' * before}{headers['authorization']} is wrong"}

    with Complaining() as complaining:
        server = HTTPServer(complaining.url, "URL", Secret(KEY, "A_KEY"), FlowConfig(patience=5.0))
        with pytest.raises(RequestRefused) as error:
            server.ask("GET", "/v1/models")
        server.close()
    assert KEY[:6] not in str(error.value) and KEY[:6] not in error.value.said
    assert "Check A_KEY (set)" in str(error.value)


def test_a_key_that_is_not_set_is_asked_for_by_its_name():
    """`Check no key (not set)` sent nobody to the line of .env that is empty."""
    pytest.importorskip("openai")
    from trainers.evaluation.loopback_servers import FakeVLLM

    with FakeVLLM(tiny_teacher(), byte_tokenizer(), key="needed-0123") as vllm:
        with pytest.raises(ValueError, match=r"answers 401.*Check VLLM_REMOTE_API_KEY \(not set\)"):
            build_teacher("vllm-remote", byte_tokenizer(), {"VLLM_REMOTE_URL": f"{vllm.url}/v1"})
