"""What a user can get wrong, said once and clearly."""


class UserError(ValueError):
    """Bad input. The message names the values and a way out; programs print it without a traceback.

    Form: ``name (value) must RELATION other (value): WHY. FIX.``
    """
