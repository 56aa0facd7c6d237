"""Who may speak to the server: Host names, API keys, origins."""

from __future__ import annotations

import hmac
import socket
from pathlib import Path
from typing import Any

import pytest

from gptedge.errors import DataError, UsageError
from gptedge.serve.guard import host_name
from gptedge.serve.settings import ServerSettings, read_api_key


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:80", "localhost"),
        ("127.0.0.1:8080", "127.0.0.1"),
        ("[::1]:8080", "[::1]"),
        ("[::1]", "[::1]"),
        ("evil.example:8080", "evil.example"),
        ("localhost:80@evil.example", "localhost:80@evil.example"),
        ("[::1].evil.example", "[::1].evil.example"),
        ("[::1", "[::1"),
        ("", ""),
    ],
)
def test_host_name(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:99", "LOCALHOST"])
def test_own_host_names(shared: Any, host: str) -> None:
    assert shared.client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nope"])
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8080", "0.0.0.0"])
def test_strange_host_names(shared: Any, host: str, path: str) -> None:
    response = shared.client.get(path, headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"
    assert host in response.json()["error"]["message"]


def test_the_host_is_checked_only_on_loopback(start_server: Any) -> None:
    server = start_server(host="0.0.0.0")
    port = server.url.rsplit(":", 1)[1]
    response = server.client.get(f"http://127.0.0.1:{port}/health", headers={"host": "my-box.lan"})
    assert response.status_code == 200


def test_an_ipv6_server(start_server: Any) -> None:
    server = start_server(host="::1")
    assert server.url.startswith("http://[::1]:")
    assert server.client.get("/health").status_code == 200


def test_the_key(start_server: Any) -> None:
    client = start_server(api_key="s3cret").client
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": "bearer s3cret"}).status_code == 200
    wrong = ("Bearer s3cre", "Bearer s3cret2", "Bearer", "Basic s3cret", "s3cret", "Bearer \xe9")
    for header in (None, *(w.encode("latin-1") for w in wrong)):
        for path in ("/v1/models", "/nope"):
            response = client.get(path, headers={} if header is None else {"authorization": header})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "s3cret" not in response.text
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 401


def test_the_key_is_compared_in_constant_time(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    compare = hmac.compare_digest

    def noting(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    start_server(api_key="s3cret").client.get("/v1/models", headers={"authorization": "Bearer wrong"})
    assert compared == [b"wrong"]


@pytest.mark.parametrize("text", ["k1", "k1\n", "\n  k1  \r\n\n"])
def test_key_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    assert read_api_key(tmp_path / "key") == "k1"


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "0 lines"), (b" \n\n", "0 lines"), (b"a\nb\n", "2 lines"), (b"\xff\xfe", "plain ASCII")]
)
def test_bad_key_file(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "key").write_bytes(data)
    with pytest.raises(DataError, match=words):
        read_api_key(tmp_path / "key")


PREFLIGHT = {
    "origin": "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def test_web_pages_are_kept_out_by_default(shared: Any) -> None:
    assert shared.client.options("/v1/chat/completions", headers=PREFLIGHT).status_code == 405
    response = shared.client.get("/v1/models", headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in response.headers


def test_cors_for_the_origins_that_are_named(start_server: Any) -> None:
    client = start_server(cors_origins=("https://app.example", "https://b.example"), api_key="k").client
    response = client.options("/v1/chat/completions", headers=PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-stainless-os" in response.headers["access-control-allow-headers"].lower()
    refused = client.get("/v1/models", headers={"origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"  # so that the page can read why
    assert (
        client.options("/v1/chat/completions", headers=PREFLIGHT | {"origin": "https://evil.example"}).status_code
        == 400
    )


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.1.5", "box.lan")),
    ],
)
def test_loopback(host: str, is_loopback: bool) -> None:
    assert ServerSettings(host=host).is_loopback is is_loopback


@pytest.mark.parametrize("change", [{"port": -1}, {"port": 65536}, {"slots": 0}, {"slots": 65}, {"max_waiting": -1}])
def test_settings_out_of_range(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(change))} is {next(iter(change.values()))}"):
        ServerSettings(**change)  # type: ignore[arg-type]


def test_request_log(start_server: Any, capfd: pytest.CaptureFixture[str]) -> None:
    server = start_server(log_requests=True)
    server.complete("what is said stays private")
    server.client.get("/a%0Ab")
    lines: list[str] = []

    def has_two_lines() -> bool:
        out, err = capfd.readouterr()
        assert out == ""
        lines.extend(line for line in err.splitlines() if line.startswith("127."))  # other tests' servers may end now
        return len(lines) == 2

    server.wait_until(has_two_lines)  # a line is written when its answer is out
    first, second = lines
    assert first.startswith("127.0.0.1 POST /v1/completions 200 ")
    assert first.endswith(" ms")
    assert second.startswith("127.0.0.1 GET /a%0Ab 404 ")


def test_quiet_without_it(
    start_server: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server()
    server.complete("x")
    server.client.get("/nope")
    with socket.create_connection(server.sock.getsockname(), timeout=5) as connection:
        connection.sendall(b"no http\r\n\r\n")
        assert connection.recv(1000)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
