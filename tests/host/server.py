"""A ComfyUI server process, driven over HTTP and WebSocket as the browser drives it."""

import io
import json
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import requests
import websocket
from PIL import Image

PACK = Path(__file__).absolute().parents[2]
NAME = "comfyui-dmm"


class NodeError(Exception):
    """A node failed; ``node`` is its id in the graph, the message is what the user sees."""

    def __init__(self, node: str, message: str):
        super().__init__(message)
        self.node = node


class Server:
    """``main.py`` on a free port with ``base`` as its folder and this pack linked into it; a context manager. cpu: with ``--cpu``."""

    def __init__(self, host: Path, base: Path, arguments: tuple[str, ...] = (), cpu: bool = True):
        self.host, self.base, self.arguments = host, base, (*(("--cpu",) if cpu else ()), *arguments)
        (base / "custom_nodes").mkdir(parents=True)
        (base / "custom_nodes" / NAME).symlink_to(PACK, target_is_directory=True)
        for name in ("dmm", "checkpoints", "loras"):
            (base / "models" / name).mkdir(parents=True)
        self.log = base / "server.log"

    def __enter__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        command = [
            *(sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(port)),
            *("--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"),
            *("--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", NAME),
            *self.arguments,
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=self.host, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait_until_ready(self, seconds: float = 600):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                requests.get(f"http://{self.address}/system_stats", timeout=5).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")

    def get(self, path: str, **parameters):
        response = requests.get(f"http://{self.address}/{path}", params=parameters, timeout=60)
        response.raise_for_status()
        return response

    def run(self, graph: dict, seconds: float = 300) -> dict:
        """Queue an API-format graph, wait for its end -> outputs {node id: ui dict}.

        Raises NodeError when a node fails, while running or in the check before.
        """
        client = uuid.uuid4().hex
        # The socket first: messages of a prompt go to the client that is connected when it runs.
        connection = websocket.create_connection(f"ws://{self.address}/ws?clientId={client}", timeout=seconds)
        try:
            body = {"prompt": graph, "client_id": client}
            response = requests.post(f"http://{self.address}/prompt", json=body, timeout=60)
            if response.status_code == 400:
                self._raise_refusal(response.json())
            response.raise_for_status()
            prompt = response.json()["prompt_id"]
            self._wait_for_end(connection, prompt)
        finally:
            connection.close()
        return self.get(f"history/{prompt}").json()[prompt]["outputs"]

    def interrupt(self) -> None:
        """As the browser's cancel button does."""
        requests.post(f"http://{self.address}/interrupt", json={}, timeout=30).raise_for_status()

    @staticmethod
    def _raise_refusal(body: dict):
        for node, report in body["node_errors"].items():
            raise NodeError(node, "; ".join(f"{e['message']}: {e['details']}" for e in report["errors"]))
        raise NodeError("", body["error"]["message"])

    @staticmethod
    def _wait_for_end(connection, prompt: str):
        while True:
            frame = connection.recv()
            if not isinstance(frame, str):  # a preview picture
                continue
            message = json.loads(frame)
            data = message["data"]
            if data.get("prompt_id") != prompt:
                continue
            if message["type"] == "execution_error":
                raise NodeError(data["node_id"], data["exception_message"].strip())
            if message["type"] == "executing" and data["node"] is None:  # sent once the outputs are in the history
                return

    def image(self, entry: dict) -> Image.Image:
        """The picture behind an entry of a Save Image or Preview Image node's ``images``."""
        picture = Image.open(io.BytesIO(self.get("view", **entry).content))
        picture.load()
        return picture
