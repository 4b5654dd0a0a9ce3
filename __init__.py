"""PC-Talk for ComfyUI. ComfyUI calls `comfy_entrypoint`; everything else lies in nodes/ and pctalk/."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Register the model folders and list the nodes."""
    from .nodes import PCTalkExtension

    return PCTalkExtension()
