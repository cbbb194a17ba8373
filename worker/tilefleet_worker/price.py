"""What tokens cost. Pure."""


def dollars_per_million(price_per_hour: float, tokens_per_second: float) -> float:
    """Price of a million tokens from an hour's, at this rate all the time."""
    return price_per_hour / (tokens_per_second * 3600 / 1e6)
