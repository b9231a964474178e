"""The token file and the command that adds to it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli import ask, connection, main
from ranking.serving.client import Client
from ranking.serving.security_client import Credentials
from ranking.serving.tokens import Caller, TokenBook, TokenError, make_token, read_tokens


def test_the_command_prints_a_token_once_and_keeps_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    words = ["token", "make", "shop", "--role", "write", "--file", str(file)]
    token = CliRunner().invoke(main.app, words).stdout.strip()
    kept = file.read_text()
    assert token.startswith("shop.") and len(token) > 40 and token.partition(".")[2] not in kept
    assert kept.startswith("shop write scrypt ") and file.stat().st_mode & 0o777 == 0o600
    again = CliRunner().invoke(main.app, words)
    assert isinstance(again.exception, TokenError) and "shop already" in str(again.exception) and file.read_text() == kept
    made = json.loads(CliRunner().invoke(main.app, ["token", "make", "two", "--file", str(file), "--json"]).stdout)
    assert made["role"] == "read" and asyncio.run(TokenBook(file).caller(made["token"])) == Caller("two", "read")
    assert asyncio.run(TokenBook(file).caller(token)) == Caller("shop", "write")


def test_a_file_edited_by_hand_is_read_and_kept_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("# of the shop\n\n")
    file.chmod(0o640)
    token = make_token(file, "a", "admin")
    file.write_text(file.read_text().rstrip("\n"))
    make_token(file, "b", "read")
    assert set(read_tokens(file)) == {"a", "b"} and file.stat().st_mode & 0o777 == 0o640
    assert file.read_text().startswith("# of the shop\n") and token not in repr(read_tokens(file))


@pytest.mark.parametrize(
    "line", ["shop", "shop read scrypt AA== AA==", "shop king scrypt {}", "sh:op read scrypt {}", "shop read md5 {}", "\u00e9"]
)
def test_lines_that_are_none_are_refused_without_their_words(line: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    make_token(file, "good", "read")
    rest = " ".join(file.read_text().split()[3:])
    file.write_text(file.read_text() + line.format(rest) + "\n", encoding="utf-8")
    with pytest.raises(TokenError, match="expected") as caught:
        read_tokens(file)
    assert rest not in str(caught.value)


def test_what_anybody_could_write_into_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    make_token(file, "good", "read")
    file.write_text(file.read_text() * 2)
    with pytest.raises(TokenError, match="line 2 has a name that stands above"):
        TokenBook(file)
    file.chmod(0o666)
    with pytest.raises(TokenError, match="chmod"):
        TokenBook(file)
    for name, role in (("a b", "read"), ("", "read"), ("a.b", "read"), ("a", "root"), ("a\n", "read")):
        with pytest.raises(TokenError, match="expected"):
            make_token(tmp_path / "other.txt", name, role)
    assert not (tmp_path / "other.txt").exists()


def test_a_known_token_costs_no_slow_hash(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    token = make_token(file, "shop", "read")

    async def known_while_the_slow_hash_is_taken() -> None:
        book = TokenBook(file)
        assert await book.caller(token) is not None
        async with book._one_at_a_time:  # whoever needs the slow hash now waits for ever
            assert await asyncio.wait_for(book.caller(token), 30) is not None
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(book.caller(f"{token}x"), 0.2)

    asyncio.run(known_while_the_slow_hash_is_taken())


def test_a_client_shows_what_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "shop.token"
    file.write_text("shop.secret\n")
    monkeypatch.setenv("BREWLINE_TOKEN", "other.secret")
    assert Credentials.from_environment() == Credentials(token="other.secret")
    monkeypatch.setenv("BREWLINE_TOKEN_FILE", str(file))
    assert Credentials.from_environment().token == "shop.secret" and "secret" not in repr(Credentials.from_environment())
    for content in ("", "two words", "a\nb"):
        file.write_text(content)
        with pytest.raises(TokenError, match="holds no token"):
            Client()


def test_a_group_of_commands_takes_the_files_of_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.setenv(f"BREWLINE_{name}", "")
    app = typer.Typer()
    app.add_typer(ask.app, name="ask", callback=connection.credentials)
    result = CliRunner().invoke(app, ["ask", "--ca", str(tmp_path / "none.pem"), "info"])
    assert isinstance(result.exception, BrewlineError) and "none.pem cannot be read" in str(result.exception)
    assert os.environ["BREWLINE_CA"] == str(tmp_path / "none.pem")
