"""The page by the Model Context Protocol, asked by the protocol's own client."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from app_fixtures import SITES, collect_loops, free_port, tiny

from saehook import Program, steer
from saehook.app import Limits, serve

pytestmark = [
    pytest.mark.slow,
    # Gradio leaves event loops and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PROMPT = "hello, world"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = serve(tiny(), port=free_port(), limits=Limits(new_tokens=50), mcp=True, block=False, quiet=True)
    yield f"{app.local_url}gradio_api/mcp/"
    app.close()
    collect_loops()


def asked(url: str, *calls: tuple[str, dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """The tools on offer, and what calling some of them gives."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def ask() -> tuple[list[Any], list[Any]]:
        async with streamable_http_client(url) as (receive, send, *_), ClientSession(receive, send) as session:
            await session.initialize()
            tools = (await session.list_tools()).tools
            return tools, [await session.call_tool(name, arguments) for name, arguments in calls]

    with ThreadPoolExecutor(1) as thread:  # Playwright leaves an event loop running in this one
        return thread.submit(anyio.run, ask).result()


def test_a_language_model_is_offered_the_named_endpoints(url):
    tools, _ = asked(url)
    expected = "read inspect generate sweep attribute latent latents_for_token latents_here_not_there".split()
    assert sorted(tool.name for tool in tools) == sorted(expected), "and nothing of the page itself"
    for tool in tools:
        assert tool.description
        assert all("description" in field for field in tool.inputSchema["properties"].values()), tool.name


def test_a_program_travels_with_the_call(url):
    program = Program(edits=[steer(3, 4.0, site=SITES[0])])
    arguments = {"prompt": PROMPT, "max_new_tokens": 12, "sample": False}
    _, (edited, base) = asked(url, ("generate", {**arguments, "program": program.to_json()}), ("generate", arguments))
    for answer, edits in ((edited, program), (base, ())):
        expected = tiny().generate(PROMPT, edits=edits, max_new_tokens=12, do_sample=False).text
        assert not answer.isError
        assert repr(expected) in answer.content[0].text


def test_a_mistake_is_told_with_both_numbers(url):
    _, (answer,) = asked(url, ("generate", {"prompt": PROMPT, "max_new_tokens": 51}))
    assert answer.isError
    assert "51 new tokens were asked for; this page allows 1 to 50" in answer.content[0].text


def test_a_foreign_host_is_refused(url):
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}})
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    place = urllib.parse.urlsplit(url)
    for host, status in (("localhost", 200), ("evil.example", 400)):
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=20)
        connection.request("POST", place.path, body, headers | {"Host": host})
        assert connection.getresponse().status == status
        connection.close()
