"""What benchmarks/serve.py says where it cannot measure."""

import asyncio
import contextlib
import sys
import threading

import pytest

from benchmarks import serve
from minigpt4.common.errors import UserError
from minigpt4.serve.server import address, listen


@pytest.mark.parametrize("arguments", [["--clients", "1"], ["--clients", "0"], ["--repeats", "0"]])
def test_numbers_that_cannot_be_compared(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(SystemExit) as error:
        serve.main()
    assert error.value.code == 2 and "--clients must be 2 or more" in capsys.readouterr().err


REFUSAL = b'HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\n\r\n{"error": {"message": "Wait."}}'


@pytest.mark.parametrize(("answer", "reason"), [(REFUSAL, "Wait."), (b"", "It closed the connection.")])
def test_a_refusal_is_one_sentence(answer, reason):
    with listen("127.0.0.1", 0) as listener:

        def refuse():
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                request = b""
                while not request.endswith(b"true}}"):
                    request += connection.recv(2**20)
                connection.sendall(answer)

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(UserError, match=f"give fewer --clients. {reason}"):
            asyncio.run(serve.Client(address(listener), 0).ask(4))
        thread.join()
