"""`bagel-ds web`: pictures are those of `bagel-ds generate`, wrong requests are one message, others are kept out."""

from __future__ import annotations

import base64
import http.client
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bagel_ds.cli.main import main
from bagel_ds.demo import write_demo
from bagel_ds.web import server as web_server
from bagel_ds.web import work as web_work
from bagel_ds.web.models import Models
from bagel_ds.web.server import Server
from bagel_ds.web.work import Work
from tests.inference.test_adapters import LORAS, write_adapter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TINY = {"num_timesteps": 4, "image_shapes": [32, 48], "max_think_token_n": 6}
SOON = 300  # seconds; the machine may be busy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with both weight files, which differ."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, seed=0)
    tensors = load_file(folder / "model" / "ema.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.startswith("llm2vae"):
            tensors[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    return folder / "model"


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server(Work(Models(model, device="cpu")), "127.0.0.1", 0) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def call(server: Server, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=SOON)
    body = None if content is None else json.dumps(content).encode()
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()


def refused(server: Server, words: dict[str, Any]) -> str:
    status, content = call(server, "POST", "/api/jobs", words)
    assert status == 400
    return json.loads(content)["error"]


def done(server: Server, words: dict[str, Any]) -> dict[str, Any]:
    """The job of a request, when it has ended."""
    status, content = call(server, "POST", "/api/jobs", {**TINY, **words})
    assert status == 200, content
    return ended(server, json.loads(content)["name"])


def ended(server: Server, name: str) -> dict[str, Any]:
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        job = json.loads(call(server, "GET", f"/api/jobs/{name}")[1])
        if job["state"] not in ("waiting", "running"):
            return job
        time.sleep(0.05)
    raise AssertionError("the job did not end")


def picture(server: Server, item: dict[str, str]) -> Image.Image:
    status, content = call(server, "GET", "/" + item["image"])
    assert status == 200
    return Image.open(io.BytesIO(content))


def generated(model: Path, tmp_path: Path, *words: str) -> bytes:
    """The pixels that `bagel-ds generate` draws."""
    sizes = ["--num_timesteps", "4", "--image_shapes", "32", "48", "--max_think_token_n", "6"]
    out = ["--device", "cpu", "--out", str(tmp_path / "out.png")]
    assert main(["generate", "--model_path", str(model), *sizes, *out, *words]) == 0
    with Image.open(tmp_path / "out.png") as image:
        return image.tobytes()


def test_a_picture_is_the_one_that_generate_draws(server: Server, model: Path, tmp_path: Path) -> None:
    job = done(server, {"mode": "t2i", "prompt": "a red square", "seed": 7})
    assert job["state"] == "done" and (job["step"], job["steps"]) == (3, 3)
    drawn = picture(server, job["panels"][0]["items"][0])
    assert drawn.size == (48, 32)
    assert drawn.tobytes() == generated(model, tmp_path, "--prompt", "a red square", "--seed", "7")


def test_average_and_weights_are_drawn_side_by_side_from_one_seed(server: Server, model: Path, tmp_path: Path) -> None:
    job = done(server, {"prompt": "a red square", "seed": 3, "weights": ["ema", "model"]})
    assert [panel["title"] for panel in job["panels"]] == ["EMA", "weights"]
    for name, panel in zip(("ema", "model"), job["panels"]):
        wanted = generated(model, tmp_path, "--prompt", "a red square", "--seed", "3", "--weights", name)
        assert picture(server, panel["items"][0]).tobytes() == wanted
    one, other = (picture(server, panel["items"][0]).tobytes() for panel in job["panels"])
    assert one != other


@pytest.fixture(scope="module")
def adapted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[str]]]:
    """A server with two adapters, and the values of --lora that it has got."""
    folder = tmp_path_factory.mktemp("adapters")
    words = [f"{write_adapter(folder / name, model, lora)}:0.5" for name, lora in LORAS.items()]
    with Server(Work(Models(model, device="cpu", lora=words)), "127.0.0.1", 0) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found, words
        found.shutdown()


def test_each_request_chooses_its_adapters(adapted: tuple[Server, list[str]], model: Path, tmp_path: Path) -> None:
    server, (cat, style) = adapted
    said = json.loads(call(server, "GET", "/api/model")[1])
    assert said["adapters"] == {"cat": 0.5, "style": 0.5} and [each["name"] for each in said["weights"]] == ["ema"]
    base = ["--prompt", "a red square", "--weights", "ema"]
    for lora, words in (
        ({"cat": 0.5, "style": 0}, [*base[:2], "--lora", cat]),
        ({"cat": 0, "style": 0}, base),
        (None, [*base[:2], "--lora", cat, "--lora", style]),
    ):
        job = done(server, {"prompt": "a red square", "lora": lora})
        assert picture(server, job["panels"][0]["items"][0]).tobytes() == generated(model, tmp_path, *words), lora
    assert "there is no adapter 'dog'; expected one of cat, style" in refused(server, {"prompt": "x", "lora": "dog"})


def test_an_uploaded_picture_is_edited_and_asked_about(
    server: Server, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "red.png"
    Image.new("RGB", (40, 60), (200, 0, 0)).save(file)
    images = [base64.b64encode(file.read_bytes()).decode()]
    small = {"image_shapes": None}
    edited = done(server, {"mode": "edit", "prompt": "make it blue", "images": images, **small})
    wanted = generated(model, tmp_path, "--prompt", "make it blue", "--image", str(file))
    assert picture(server, edited["panels"][0]["items"][0]).tobytes() == wanted
    capsys.readouterr()
    asked = done(server, {"mode": "vqa", "prompt": "what is it?", "images": images})
    words = ["--prompt", "what is it?", "--image", str(file), "--mode", "vqa", "--max_think_token_n", "6"]
    assert main(["generate", "--model_path", str(model), "--device", "cpu", *words]) == 0
    assert asked["panels"][0]["items"] == [{"text": capsys.readouterr().out.removesuffix("\n")}]


def test_thinking_and_reasoning_give_texts_and_pictures_in_order(server: Server) -> None:
    thought = done(server, {"mode": "think", "prompt": "a cat"})["panels"][0]["items"]
    assert ["text" in item for item in thought] == [True, False]
    reasoned = done(server, {"mode": "interleave", "prompt": "why?", "max_iterations": 2})["panels"][0]["items"]
    assert len(reasoned) == 2 and "text" in reasoned[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "num_timesteps": 1}, "num_timesteps is 1, expected a whole number from 2 to 1000"),
        ({"prompt": "x", "num_timestep": 3}, "did you mean num_timesteps?"),
        ({"prompt": "x", "seed": -1}, "seed -1: expected a whole number"),
        ({"prompt": "x", "mode": "draw"}, "mode 'draw': expected one of"),
        ({"prompt": "x", "weights": ["best"]}, "expected a list of ema, model"),
        ({"prompt": "x", "image_shapes": [33, 32]}, "both must be multiples of 16"),
        ({"prompt": "x", "mode": "edit"}, "mode edit needs an image"),
        ({"prompt": "x", "images": ["aGVsbG8="]}, "image: "),
        ({"prompt": "x", "images": ["?"]}, "not base64"),
        ({"prompt": "x", "images": "/etc/passwd"}, "expected a list of texts in base64"),
    ],
)
def test_a_wrong_request_is_one_message_and_waits_for_nothing(words: dict[str, Any], said: str, server: Server) -> None:
    assert said in refused(server, words)


def test_a_file_of_the_server_can_not_be_asked_for(server: Server, model: Path) -> None:
    assert call(server, "GET", "/../models.py")[0] == 404
    assert call(server, "GET", "/page/index.html")[0] == 404
    assert "needs an image" in refused(server, {"prompt": "x", "mode": "edit", "image": str(model / "a.png")})


def test_other_sites_and_names_are_kept_out(server: Server) -> None:
    words = {"prompt": "x", **TINY}
    assert call(server, "GET", "/", Host="attacker.example")[0] == 403
    assert call(server, "POST", "/api/jobs", words, Origin="http://attacker.example")[0] == 403
    assert call(server, "POST", "/api/jobs", words, **{"Content-Type": "text/plain"})[0] == 415
    # Through `ssh -L` the port is another one.
    assert call(server, "GET", "/api/model", Host="localhost:8888")[0] == 200


def test_a_request_that_is_too_large_is_refused_unread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "MOST_BYTES", 100)
    status, content = call(server, "POST", "/api/jobs", {"prompt": "x" * 100})
    assert status == 413 and "smaller or fewer pictures" in json.loads(content)["error"]


def test_the_page_fetches_nothing_from_elsewhere(server: Server) -> None:
    for path in web_server.FILES:
        status, content = call(server, "GET", path)
        assert status == 200 and b"://" not in content.replace(b"http://www.w3.org", b"")


def test_a_stopped_request_ends_and_the_next_one_is_done(server: Server) -> None:
    long = {"prompt": "x", **TINY, "num_timesteps": 1000}
    name = json.loads(call(server, "POST", "/api/jobs", long)[1])["name"]
    behind = json.loads(call(server, "POST", "/api/jobs", {"prompt": "y", **TINY})[1])["name"]
    assert json.loads(call(server, "GET", f"/api/jobs/{behind}")[1])["ahead"] == 1
    assert call(server, "POST", f"/api/jobs/{name}/stop", {})[0] == 200
    job = ended(server, name)
    assert job["state"] == "stopped" and job["step"] < 999 and not job["panels"]
    assert ended(server, behind)["state"] == "done"


def test_a_request_that_fails_says_why_and_the_next_one_is_done(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(web_work, "_png", lambda image: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        failed = done(server, {"prompt": "x"})
    assert failed["state"] == "failed" and "--max_gpu_memory" in failed["error"]
    assert done(server, {"prompt": "x"})["state"] == "done"


def test_a_long_line_and_old_results_have_an_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads(call(server, "POST", "/api/jobs", {"prompt": "x", **TINY})[1])["name"]
    assert ended(server, first)["state"] == "done"
    monkeypatch.setattr(web_work, "KEPT", 0)
    done(server, {"prompt": "y"})
    status, content = call(server, "GET", f"/api/jobs/{first}")
    assert status == 400 and "no longer known" in json.loads(content)["error"]
    monkeypatch.setattr(web_work, "MOST_WAITING", 0)
    assert "are waiting already" in refused(server, {"prompt": "x", **TINY})


@pytest.mark.parametrize("port", ["65536", "99999", "-1", "http"])
def test_a_port_that_is_none_is_refused_before_anything_is_loaded(
    port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["web", "--model_path", "no/such/folder", "--port", port])
    assert ended.value.code == 2 and f"found {port!r}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_message(server: Server, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(server.server_address[1])
    assert main(["web", "--model_path", str(model), "--device", "cpu", "--port", port]) == 2
    assert f"can't serve at 127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.skipif(not find_spec("playwright"), reason="needs playwright (pip install playwright)")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_in_a_browser_an_adapter_is_switched_off(
    adapted: tuple[Server, list[str]], model: Path, tmp_path: Path
) -> None:
    from playwright.sync_api import expect, sync_playwright

    server, (cat, _) = adapted
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(SOON * 1000)
        expect.set_options(timeout=SOON * 1000)
        page.goto(server.address)
        expect(page.get_by_label("Adapter cat")).to_have_value("0.5")
        page.get_by_label("Adapter style").fill("0")
        page.get_by_label("Prompt").fill("a red square")
        page.get_by_text("Settings").click()
        for label, value in (("Height", "32"), ("Width", "48"), ("Points of the schedule", "4")):
            page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Generate", exact=True).click()
        drawn = page.locator("#results img")
        expect(drawn).to_have_count(1)
        content = page.request.get(server.address + "/" + str(drawn.get_attribute("src"))).body()
        wanted = generated(model, tmp_path, "--prompt", "a red square", "--lora", cat)
        assert Image.open(io.BytesIO(content)).tobytes() == wanted
        browser.close()


@pytest.mark.skipif(not find_spec("playwright"), reason="needs playwright (pip install playwright)")
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_in_a_browser_a_typed_prompt_becomes_generates_picture(server: Server, model: Path, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(SOON * 1000)
        expect.set_options(timeout=SOON * 1000)
        faults: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.address)

        page.get_by_label("Prompt").fill("a red square")
        page.get_by_label("Seed").fill("7")
        page.get_by_text("Settings").click()
        for label, value in (("Height", "32"), ("Width", "48"), ("Points of the schedule", "4")):
            page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Generate", exact=True).click()
        drawn = page.locator("#results img")
        expect(drawn).to_have_count(1)
        content = page.request.get(server.address + "/" + str(drawn.get_attribute("src"))).body()
        wanted = generated(model, tmp_path, "--prompt", "a red square", "--seed", "7")
        assert Image.open(io.BytesIO(content)).tobytes() == wanted
        expect(drawn).to_have_js_property("naturalWidth", 48)

        page.get_by_label("Weights").select_option("ema,model")
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.locator("#results article")).to_have_count(2)
        expect(page.locator("#results h2")).to_have_text(["From the EMA", "From the weights"])

        Image.new("RGB", (40, 60), (200, 0, 0)).save(tmp_path / "red.png")
        page.get_by_role("tab", name="Understand").click()
        page.locator("#files").set_input_files(tmp_path / "red.png")
        expect(page.locator("#thumbnails img")).to_have_count(1)
        page.get_by_label("Question").fill("What is it?")
        page.get_by_label("Most tokens").fill("6")
        page.get_by_label("Weights").select_option("ema")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#results .text")).to_have_count(1)

        page.get_by_role("tab", name="Edit").click()
        page.get_by_label("What to change").fill("")
        page.get_by_role("button", name="Edit", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("the prompt is empty")
        browser.close()
    assert all(url.startswith((server.address, "data:", "blob:")) for url in asked)
    assert [fault for fault in faults if "400" not in fault] == []
