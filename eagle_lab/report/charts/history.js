// Hides what isn't of the chosen machine and arm. An element without arms (a profile, say) goes by its machine alone.
const chosen = {};
for (const list of document.querySelectorAll("select")) {
  list.addEventListener("change", () => {
    chosen[list.id] = list.value;
    for (const part of document.querySelectorAll("[data-machine]")) {
      const arms = part.dataset.arms ? JSON.parse(part.dataset.arms) : null;
      part.hidden =
        (chosen.machine && part.dataset.machine !== chosen.machine) ||
        (chosen.arm && !(arms && arms.includes(chosen.arm)));
      if (!part.hidden) for (const chart of part.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(chart);
    }
  });
}
