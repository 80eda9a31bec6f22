"""One run with planted secrets and planted folders; everything that it wrote, sent or printed is searched for them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Job, small_run, write_conversations, write_tiny_model
from hub_server import HubServer
from s3_server import BUCKET, KEYS, s3_server

TOKEN = "hf_plantedtoken0123456789"
AWS_KEY, AWS_SECRET = "AKIAPLANTED012345678", "planted/aws+secret/0123456789"
HOOK = "planted-hook-9f8e7d"
PASSWORD = "planted-password-4711"
FOLDER = "planted-folder-of-ann"
SIGNATURE = "planted0signature0abcdef"
PLANTED = (TOKEN, AWS_KEY, AWS_SECRET, HOOK, PASSWORD, FOLDER, SIGNATURE, "rpa_PLANTED0123456789")


class Listener:
    """Serves one file to a signed address, and keeps what is posted."""

    def __init__(self, data: bytes) -> None:
        bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()

            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.bodies = bodies
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Everything by where it was found. The Hub refuses the first publication and echoes the token, as some proxies do."""
    home = tmp_path_factory.mktemp("t") / FOLDER
    (home / "data").mkdir(parents=True)
    model, data = write_tiny_model(home / "model"), write_conversations(home / "data" / "chats.jsonl", 40)
    (home / "prompts.jsonl").write_text('{"prompt": "What follows 7?", "expected": "8"}\n', "utf-8")
    listener = Listener(write_conversations(home / "more.jsonl", 60).read_bytes().replace(b"What", b"Which"))
    signed = f"{listener.url}/more.jsonl?X-Amz-Signature={SIGNATURE}&X-Amz-Expires=600"
    job = Job(home / "here", small_run(model, data))
    seen: dict[str, bytes] = {}
    with s3_server() as s3, HubServer({TOKEN: "tester"}) as hub:
        settings = {
            "DATASETS": f"{data}\n{signed}",
            "EVAL_PROMPTS": str(home / "prompts.jsonl"),
            "EVAL_MAX_NEW_TOKENS": "4",
            "OUTPUT_URI": f"s3://{BUCKET}/runs",
            "AWS_ENDPOINT_URL_S3": s3.proxy.url,
            "AWS_ACCESS_KEY_ID": AWS_KEY,
            "AWS_SECRET_ACCESS_KEY": AWS_SECRET,
            "AWS_REGION": KEYS["region_name"],
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home / "hf"),
            "HF_TOKEN": TOKEN,
            "HUB_MODEL_ID": "tester/planted",
            "WEBHOOK_URL": f"{listener.url}/{HOOK}",
            "RUNPOD_API_KEY": "rpa_PLANTED0123456789",
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        }
        echo = f"Invalid header Authorization: Bearer {TOKEN} from {home}"
        hub.fail("POST", "/commit/", status=400, headers={"X-Error-Message": echo})
        status, output = job.run("run", **settings)
        assert status == 6 and "HUB_MODEL_ID=tester/planted" in output, output
        seen["log of the run"] = output.encode()
        status, output = job.run("publish", **settings)
        assert status == 0, output
        seen["log of publish"] = output.encode()
        # A crash, with a traceback of a library in it: the tokenizer's file is rubbish.
        status, output = job.run(
            "run", **{**settings, "MODEL_ID": str(broken(model, home / "broken")), "RUN_ID": "b", "HUB_MODEL_ID": ""}
        )
        assert status != 0, output
        seen["log of a failure"] = output.encode()
        for name in s3.names():
            seen[f"store: {name}"] = s3.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        for path, content in hub.files("model", "tester/planted").items():
            seen[f"Hub: {path}"] = content
        commits = hub.repos["model", "tester/planted"].branches["main"]
        seen["Hub: messages"] = "\n".join(commit.message for commit in commits).encode()
    for number, body in enumerate(listener.bodies):
        seen[f"webhook: {number}"] = body
    listener.server.shutdown()
    return seen


def broken(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing"}}', "utf-8")
    return folder


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found_nowhere(written: dict[str, bytes], planted: str) -> None:
    assert [where for where, content in written.items() if planted.encode() in content] == []


def test_everything_was_searched(written: dict[str, bytes]) -> None:
    for where in (
        "store: runs/r/report.json",
        "store: runs/r/report.html",
        "store: runs/r/settings.json",
        "store: runs/r/tally.json",
        "store: runs/r/attempts/0001.json",
        "store: runs/r/adapter/README.md",
        "Hub: README.md",
        "webhook: 1",
    ):
        assert len(written[where]) > 50, where
    assert any("/data/" in where and where.endswith(".arrow") for where in written)
    report = json.loads(written["store: runs/r/report.json"])
    assert report["publication"]["repo_id"] == "tester/planted" and report["samples"][0]["answers"][0]["score"] is not None
    assert b"***" in written["log of the run"], "the Hub's echo of the token is told, blotted out"
    sources = [source["source"] for source in report["data"]["sources"]]
    assert sources[0].startswith("chats.jsonl") and sources[1].endswith("/more.jsonl")
    told = [json.loads(body) for where, body in written.items() if where.startswith("webhook")]
    events = [one["event"] for one in told]
    assert events[0] == "started" and "checkpoint" in events and events.count("stopped") >= 3
    assert {one["status"] for one in told if one["event"] == "stopped"} >= {0, 6}
