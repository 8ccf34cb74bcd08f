"""An HTTP server: `serve`."""

from __future__ import annotations

import argparse
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from pascalvl.plugins.errors import UserError, shown
from pascalvl.runtime.cli.common import check_cache, model_with_cache, notice
from pascalvl.runtime.cli.sources import HubName, engine_bundle

if TYPE_CHECKING:
    from pascalvl.runtime.server.config import MediaConfig, ServerConfig

KEY_VARIABLE = "PASCALVL_API_KEY"
_MEGABYTE = 1 << 20


def serve(args: argparse.Namespace) -> int:
    """Run `pascalvl serve`; returns the exit code."""
    from pascalvl.runtime.server.operation import address_of, bound_socket, is_local, unix_socket
    from pascalvl.runtime.server.replicas import Assignment

    assignment = Assignment.taken()
    if args.control_tokens_in_text:
        raise UserError("--control-tokens-in-text is not for servers, to which anyone writes: leave it out.")
    check_cache(args)
    if assignment:
        if not assignment.is_first:
            logging.getLogger().setLevel(logging.ERROR)
            args.refresh = False
        with unix_socket(assignment.socket) as bound:
            return _serve_model(args, _config(args, is_local=False), bound)
    with bound_socket(args.host, args.port) as bound:
        config = _config(args, is_local(bound))
        if not config.is_local and not config.api_keys:
            notice(f"pascalvl: anyone who reaches {address_of(bound)} can ask: give --api-key-file, or {KEY_VARIABLE}.")
        return (_serve_model if args.replicas == 1 else _serve_replicas)(args, config, bound)


def _serve_model(args: argparse.Namespace, config: ServerConfig, bound: socket.socket) -> int:
    from pascalvl.runtime.server.operation import address_of
    from pascalvl.runtime.server.operation import serve as serve_until_signal
    from pascalvl.runtime.server.service import Service

    source = args.bundle
    args.bundle = engine_bundle(args)
    with model_with_cache(args, args.sequences) as model:
        name = source.repo if isinstance(source, HubName) else model.manifest.source["name"]
        service = Service(model, config.named(tuple(args.served_model_name) or (name,)))
        address = address_of(bound)
        return serve_until_signal(service, bound, lambda: print(f"{service.name} at {address}/v1", flush=True))


def _serve_replicas(args: argparse.Namespace, config: ServerConfig, bound: socket.socket) -> int:
    from pascalvl.runtime.server.operation import address_of, operate
    from pascalvl.runtime.server.replicas import Replicas, visible_cards
    from pascalvl.runtime.server.router import Router

    cards = visible_cards()
    replicas = Replicas(args.given, args.replicas, cards if cards and _may_use_cards(args) else [])
    router, address = Router(replicas, config), address_of(bound)

    def listening() -> None:
        print(f"{replicas.all[0].model_name} at {address}/v1", flush=True)

    return operate(router.app, router, bound, listening, replicas.running())


def _may_use_cards(args: argparse.Namespace) -> bool:
    """Whether the backend that a bundle is for, or is made for, may run on a GPU."""
    from pascalvl.plugins.bundle import MANIFEST, Manifest

    backend, source = args.backend, args.bundle
    if isinstance(source, Path) and (source / MANIFEST).exists():
        backend = Manifest.read(source, "engine", "model").backend.get("name", backend)
    if backend == "onnxruntime":
        from pascalvl.engines.onnxruntime.backend import uses_gpu

        return uses_gpu()
    return backend != "reference"


def _config(args: argparse.Namespace, is_local: bool) -> ServerConfig:
    from pascalvl.runtime.server.config import ServerConfig

    return ServerConfig(
        model_names=(),
        api_keys=_keys(args),
        queue=args.queue,
        unload_after=args.unload_after,
        shared_prefixes=args.shared_prefixes,
        allowed_origins=tuple(args.allow_origin),
        is_local=is_local,
        media=_media(args),
        body_bytes=args.max_body * _MEGABYTE,
        drain_seconds=args.drain,
    )


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    """API keys: of the command line, of a file, and of the environment."""
    keys = list(args.api_key)
    if args.api_key_file is not None:
        try:
            lines = args.api_key_file.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is not ASCII"
            raise UserError(f"{args.api_key_file} cannot be read ({why}): expected a key a line.") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"{args.api_key_file} holds no key: expected a key a line.")
        keys += found
    if given := os.environ.get(KEY_VARIABLE, ""):
        keys += given.split()
    return tuple(dict.fromkeys(keys))


def _media(args: argparse.Namespace) -> MediaConfig:
    from pascalvl.runtime.server.config import MediaConfig
    from pascalvl.runtime.server.fetch import domain

    root: Path | None = args.media_root
    if root is not None and not root.is_dir():
        raise UserError(f"--media-root: no folder at {shown(str(root))}.")
    return MediaConfig(
        frozenset(map(domain, args.allow_media_domain)),
        root,
        args.max_pictures,
        args.max_body * _MEGABYTE,
        args.max_picture_pixels,
        max(args.max_picture_pixels, MediaConfig.request_pixels),
        args.max_frames,
    )
