"""What is told of trials on Ray Tune."""

from bt_ray.driver.tune import last_failure


def test_the_last_failure_of_a_trial_is_told_in_a_line() -> None:
    errors = (
        "Failure # 1 (occurred at 2026-01-01)\nThe actor died unexpectedly before finishing this task.\n\tclass_name: X\n"
        "Failure # 2 (occurred at 2026-01-01)\nray::run_trial() (pid=1)\n  File ...\n"
        "bt_ray.errors.InfrastructureError: No server answered: refused\n"
    )
    assert last_failure(errors) == "No server answered: refused"
    assert last_failure(errors.partition("Failure # 2")[0]) == "The actor died unexpectedly before finishing this task."
    assert last_failure("") == "its process died"
