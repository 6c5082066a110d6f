"""A stand-in for the W&B server: enough of its HTTP interface to start a run and receive its rows, or to fail."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG_S = 60.0


class StandInServer(ThreadingHTTPServer):
    """Serves on 127.0.0.1 while the context lasts.

    Args:
        hangs: never answer.

    Attributes:
        rows: the history rows of each run id, as received.
        configs: the configuration of each run id, as received.
        resumed: the run ids whose state was asked for.
    """

    daemon_threads = True

    def __init__(self, hangs: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hangs = hangs
        self.rows: dict[str, list[dict]] = {}
        self.configs: dict[str, dict] = {}
        self.resumed: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "StandInServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def graphql(self, operation: str, variables: dict) -> dict:
        if operation == "UpsertBucket":
            name, project = variables["name"], variables["project"]
            self.configs[name] = json.loads(variables["config"])
            entity = {"id": "ZQ==", "name": "me"}
            bucket = {"id": "aWQ=", "name": name, "displayName": name, "project": {"name": project, "entity": entity}}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "RunResumeStatus":
            self.resumed.append(variables["name"])
            return {"model": {"id": "bQ==", "name": "p", "entity": {"id": "ZQ==", "name": "me"}, "bucket": None}}
        if operation == "CreateRunFiles":
            return {"createRunFiles": {"runID": "aWQ=", "uploadHeaders": [], "files": []}}
        return {}


class Handler(BaseHTTPRequestHandler):
    server: StandInServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.hangs:
            time.sleep(HANG_S)
        answer = {}
        if self.path == "/graphql":
            request = json.loads(body)
            answer = {"data": self.server.graphql(request.get("operationName"), request.get("variables"))}
        elif self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            run_id = self.path.split("/")[-2]
            self.server.rows.setdefault(run_id, []).extend(map(json.loads, lines))
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass
