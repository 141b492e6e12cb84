"""Whether a person or a program asks, where the two get different answers."""

from starlette.requests import Request
from starlette.responses import Response

from api.endpoints import HTML


def wants_page(request: Request) -> bool:
    """Whether who asks takes HTML by its name, as browsers do; programs that take anything get what they always got."""
    accepted = ",".join(request.headers.getlist("accept")).lower()
    return any(_names_html(one) for one in accepted.split(","))


def varying(answer: Response) -> Response:
    """The answer, marked as one that other askers get in another form."""
    answer.headers["Vary"] = "Accept"
    return answer


def _names_html(accepted: str) -> bool:
    media_type, *parameters = (part.strip() for part in accepted.split(";"))
    return media_type == HTML and not any(_is_zero(parameter) for parameter in parameters)


def _is_zero(parameter: str) -> bool:
    name, _, value = parameter.partition("=")
    return name.strip() == "q" and value.strip().rstrip("0") in ("", "0.", ".")
