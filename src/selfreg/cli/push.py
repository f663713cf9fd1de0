"""`selfreg push`: a folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from selfreg.cli.common import clear_errors, say, setup


def push(
    folder: Annotated[Path, typer.Argument(help="What save_pretrained, a Trainer or a recipe wrote.")],
    repo: Annotated[str, typer.Argument(help="Where to: owner/name, or a name under your own user.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repo that is made; that of the owner if not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made where there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="First line of the commit.")] = None,
) -> None:
    """Push a sparse autoencoder, a classifier, unintended features or a feature catalogue to the Hub.

    The folder is loaded first, and goes up in one commit: what is not whole is not pushed, and what was cut short
    leaves the repo as it was. A catalogue becomes a data set; it holds pieces of the texts that it was built from.

    The token is that of `hf auth login`, or HF_TOKEN.

    Examples:

        selfreg push runs/toxic-chat/classifier me/toxic-chat --private

        selfreg push runs/toxic-chat/catalog me/toxic-chat-features --create-pr
    """
    setup()
    with clear_errors():
        # The models, and with them torch.
        from selfreg.hub.folders import push_folder

        hub = {"commit_message": message} if message else {}
        kind, commit = push_folder(folder, repo, private=private, revision=revision, create_pr=create_pr, **hub)
        say(f"{kind.name}: {commit.pr_url or commit.repo_url} at {commit.oid}")
