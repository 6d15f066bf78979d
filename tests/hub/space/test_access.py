"""The page for everyone: on a phone, in light and dark, with the keyboard, read aloud."""

import re

import numpy as np
import pytest
from page_helpers import DONE


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_a_phone(show, dark):
    browser = show("w4", width=390, height=844, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    outside = """[...document.querySelectorAll('main *')].filter((part) => !part.closest('.scroll, .samples, .unseen')
        && part.getBoundingClientRect().right > 390.5).map((part) => part.outerHTML)"""
    assert browser.evaluate(outside) == []
    small = """[...document.querySelectorAll('button, input[type=range], summary')].filter((part) => part.offsetHeight
        && part.getBoundingClientRect().height < 40).map((part) => part.outerHTML)"""
    assert browser.evaluate(small) == []  # to be hit by a finger


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colors_can_be_read(show, dark):
    """Text on its background has the contrast that WCAG asks for, 4.5 to 1, in the light and the dark scheme."""
    browser = show("w2", dark=dark)
    browser.evaluate("document.getElementById('compare').click()")
    browser.wait_for("document.body.dataset.compared === 'yes'")
    pairs = browser.evaluate("""[...document.querySelectorAll('body *')].filter((part) => part.offsetParent
        && !part.closest('svg, .unseen, .drop') && [...part.childNodes].some((node) => node.data?.trim()))
        .map((part) => {
            let behind = part;
            while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
            const [color, background] = [getComputedStyle(part).color, getComputedStyle(behind).backgroundColor];
            return [part.outerHTML.slice(0, 80), color, background];
        })""")
    assert len(pairs) > 40
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.1) == dark
    for part, color, behind in pairs:
        high, low = sorted((luminance(color), luminance(behind)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{part}: {color} on {behind}"


def luminance(color: str) -> float:
    channels = np.array([float(value) for value in re.findall(r"[\d.]+", color)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_all_can_be_reached_by_keyboard_and_has_a_name(show):
    browser = show("w4")
    named = """[...document.querySelectorAll('button, input, summary, a, [tabindex]')]
        .filter((part) => part.offsetParent && !(part.getAttribute('aria-label')
            || part.getAttribute('aria-labelledby') || part.innerText || part.querySelector('img')?.alt))
        .map((part) => part.outerHTML)"""
    assert browser.evaluate(named) == []
    assert browser.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")
    reached = set()
    for _ in range(25):
        browser.press("Tab")
        reached.add(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"file", "choose", "camera", "BUTTON", "slider", "compare", "SUMMARY", "A"} <= reached
    browser.evaluate("document.querySelectorAll('#samples button')[1].focus()")
    browser.press("Enter")
    browser.wait_for(DONE.format("sample-1 w4"))
    assert "4 bits" in browser.evaluate("document.getElementById('spoken').textContent")
