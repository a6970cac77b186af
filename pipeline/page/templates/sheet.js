// The contact sheet: search, filter by group and by the bars of histograms, sort, keyboard, enlarge.
(() => {
  "use strict";
  const sheet = document.getElementById("sheet");
  if (!sheet) return;
  const cards = [...sheet.children];
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const search = document.getElementById("search");
  const group = document.getElementById("group");
  const order = document.getElementById("order");
  const shown = document.getElementById("shown");
  const clear = document.getElementById("clear");
  const large = document.getElementById("large");
  const bars = [...document.querySelectorAll("g[role=button]")];
  const value = (card, name) => (card.hasAttribute("data-" + name) ? Number(card.getAttribute("data-" + name)) : NaN);
  const visible = () => [...sheet.children].filter((card) => !card.hidden);
  const button = (card) => card.querySelector(".enlarge");

  function inBars(card) {
    const pressed = bars.filter((bar) => bar.getAttribute("aria-pressed") === "true");
    const fields = new Set(pressed.map((bar) => bar.dataset.field));
    return [...fields].every((field) => pressed.some((bar) => bar.dataset.field === field &&
      value(card, field) >= Number(bar.dataset.low) && value(card, field) <= Number(bar.dataset.high)));
  }

  function refresh() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of cards) {
      const isInGroup = !group.value || card.dataset.groups.split(" ").includes(group.value);
      card.hidden = !(isInGroup && words.every((word) => texts.get(card).includes(word)) && inBars(card));
    }
    const [name, direction] = order.value.split(" ");
    const sign = direction === "down" ? -1 : 1;
    const sorted = !name ? cards : [...cards].sort((a, b) => {
      if (name === "key") return a.dataset.key < b.dataset.key ? -1 : 1;
      const [left, right] = [value(a, name), value(b, name)];
      if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right);
      return sign * (left - right);
    });
    sheet.append(...sorted);
    const left = visible();
    shown.textContent = `${left.length} of ${cards.length} rows of the sheet`;
    for (const card of cards) button(card).tabIndex = -1;
    if (left.length) button(left[0]).tabIndex = 0;
    clear.hidden = !(search.value || group.value || bars.some((bar) => bar.getAttribute("aria-pressed") === "true"));
  }

  function focus(card) {
    for (const other of cards) button(other).tabIndex = -1;
    button(card).tabIndex = 0;
    button(card).focus();
  }

  function enlarge(card) {
    const picture = large.querySelector(".picture");
    const details = large.querySelector(".details");
    const image = card.querySelector("img");
    picture.replaceChildren(...(image ? [image.cloneNode()] : []));
    details.replaceChildren(...[...card.children].filter((part) => !part.matches(".enlarge")).map((part) => part.cloneNode(true)));
    large.dataset.at = visible().indexOf(card);
    if (!large.open) large.showModal();
  }

  function turn(step) {
    const left = visible();
    const next = left[(Number(large.dataset.at) + step + left.length) % left.length];
    if (next) enlarge(next);
  }

  function columns() {
    const left = visible();
    const row = left.findIndex((card) => card.offsetTop !== left[0].offsetTop);
    return row < 0 ? left.length : row;
  }

  search.addEventListener("input", refresh);
  group.addEventListener("change", refresh);
  order.addEventListener("change", refresh);
  clear.addEventListener("click", () => {
    search.value = group.value = "";
    for (const bar of bars) bar.setAttribute("aria-pressed", "false");
    refresh();
    search.focus();
  });
  for (const bar of bars) {
    const press = () => {
      bar.setAttribute("aria-pressed", String(bar.getAttribute("aria-pressed") !== "true"));
      refresh();
    };
    bar.addEventListener("click", press);
    bar.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        press();
      }
    });
  }
  sheet.addEventListener("click", (event) => {
    const pressed = event.target.closest(".enlarge");
    if (pressed) enlarge(pressed.parentElement);
  });
  sheet.addEventListener("keydown", (event) => {
    const left = visible();
    const at = left.indexOf(event.target.closest("li"));
    const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(), Home: -at, End: left.length - 1 - at};
    const next = event.key in steps ? left[at + steps[event.key]] : null;
    if (next) {
      event.preventDefault();
      focus(next);
    }
  });
  large.addEventListener("close", () => {
    const card = visible()[Number(large.dataset.at)];
    if (card) focus(card);
  });
  large.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") turn(1);
    if (event.key === "ArrowLeft") turn(-1);
  });
  large.querySelector(".next").addEventListener("click", () => turn(1));
  large.querySelector(".before").addEventListener("click", () => turn(-1));
  large.querySelector(".close").addEventListener("click", () => large.close());
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !large.open && !event.target.closest("input, select")) {
      event.preventDefault();
      search.focus();
    }
  });
  refresh();
})();
