"""Serve a model with Ray Serve, on as many GPUs and machines as there are: `serve run ray_serve.yaml`, in this folder.

Each replica is the app of `pascalvl serve`. Ray chooses among them by what each has to do, and not by the beginnings of
conversations, as `pascalvl serve --replicas` does for the GPUs of one machine. It takes the extras `ray` and `serve`.
"""

from ray import serve
from starlette.applications import Starlette

from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.server.app import create_app
from pascalvl.runtime.server.config import ServerConfig
from pascalvl.runtime.server.service import Service


def application(arguments: dict) -> serve.Application:
    """What ``import_path`` names.

    Args:
        arguments: ``bundle``, an engine bundle's folder, the same on every machine; ``name``, what clients call it;
            ``api_keys``, one of which they need; others are those of `VisionLanguageModel.open`.
    """
    arguments = dict(arguments)
    bundle, name, keys = arguments.pop("bundle"), arguments.pop("name"), arguments.pop("api_keys", [])
    config = ServerConfig((name,), api_keys=tuple(keys), is_local=False)

    def app() -> Starlette:
        """In each replica, once."""
        service = Service(VisionLanguageModel.open(bundle, **arguments), config)
        made = create_app(service)
        made.state.service = service
        return made

    @serve.deployment
    @serve.ingress(app)
    class PascalVL:
        async def check_health(self) -> None:
            """Ray replaces a replica that is not well."""
            if (health := self.app.state.service.health) != "ok":
                raise RuntimeError(health)

    return PascalVL.bind()
