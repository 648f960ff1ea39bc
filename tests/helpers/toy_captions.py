"""What a caption of the toy world says, also one that a model wrote."""

from __future__ import annotations

from onellm_dist.shards.sources.toyworld.world import get_scenes


def parse_caption(modality: str, text: str) -> dict[str, str | None]:
    """Parse what a caption says about each attribute.

    Any text is accepted, because a model wrote it. The word at an attribute's place in the template
    counts if it is one of its values.

    Returns:
        Attribute name to value; None if the text does not say it.
    """
    words = text.split()
    values_said: dict[str, str | None] = {}
    for place, field in enumerate(get_scenes(modality).template.split()):
        if field.startswith("{"):
            values = get_scenes(modality).attributes[field[1:-1]]
            values_said[field[1:-1]] = (
                words[place] if place < len(words) and words[place] in values else None
            )
    return {name: values_said[name] for name in get_scenes(modality).attributes}
