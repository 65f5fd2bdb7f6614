"""HTTP service for object detection: OpenAI-compatible endpoints, a page to try it on, limits and metrics."""

try:
    import httptools  # noqa: F401
    import python_multipart  # noqa: F401  # checked here, because it is first used when a form comes
    import uvicorn  # noqa: F401

    from conditional_detr.serving.app import create_app
    from conditional_detr.serving.settings import ServiceSettings
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the service needs {error.name}, which is not installed: pip install 'conditional-detr[serve]'"
    ) from error

__all__ = ["ServiceSettings", "create_app"]
