"""The server. In: options; out: an exit code, when it was stopped."""

import uvicorn

from regpt2.base.console import say
from regpt2.serving.app import build_app
from regpt2.serving.models import serving
from regpt2.serving.options import ServeOptions


def serve(options: ServeOptions) -> int:
    """Serve until a signal ends it."""
    with serving(options) as models:
        say(f"Serving {', '.join(models)} at http://{options.host}:{options.port}")
        uvicorn.run(build_app(models, options.runs), host=options.host, port=options.port, log_level="warning")
    return 0
